"""README's table of families is what docs/support.csv and benchmarks/serving.csv say, and both cover what there is."""

from ptq.models.families import FAMILIES

from .conftest import ROOT
from .test_evaluate import module_of


def test_the_table_is_that_of_the_recorded_outcomes():
    support = module_of("support")
    readme = (ROOT / "README.md").read_text()
    assert f"{support.BEGIN}{support.current_table()}{support.END}" in readme, "run scripts/support.py --table"


def test_every_family_was_checked_and_is_equal():
    support = module_of("support")
    rows = support.read(ROOT / "docs" / "support.csv")
    checks = {"replayed", "streamed", *(f"read back {format}" for format in support.FORMATS)}
    assert {(row["family"], row["check"]) for row in rows} == {(family, check) for family in FAMILIES for check in checks}
    assert {row["outcome"] for row in rows} == {"equal"} and set(support.NAMES) == set(FAMILIES)


def test_what_differs_or_was_served_is_in_the_table():
    support = module_of("support")
    rows = support.read(ROOT / "docs" / "support.csv")
    for row in rows:
        if (row["family"], row["check"]) in (("mixtral", "read back int4"), ("olmo2", "streamed")):
            row["outcome"] = "differs"
    layout = "compressed-tensors"
    served = [{"model": "olmoe-tiny", "format": "int4", "layout": layout, "engine": "vllm 1", "difference": "-0.0123"}]
    served += [served[0] | {"layout": "gguf", "difference": "1"}, served[0] | {"engine": "other", "difference": "1"}]
    table = support.make_table(rows, served)
    assert "| Mixtral | equal | NVFP4, MXFP4 ¹ | not run |" in table and "| OLMo 2 | differs |" in table
    assert "| OLMoE | equal | NVFP4, MXFP4, INT4 ¹ | INT4 .0123 |" in table
