"""Texts from the Hugging Face hub: what a name means, exactly.

`NAME[:SPLIT]` for a preset, `owner/dataset[:config[:split]]` for anything else with a column "text", or "messages" of
conversations.  Rows are taken in the order in which the dataset has them; which windows of them are used is the caller's
affair, and the caller's seed.
"""

from dataclasses import dataclass, field
from itertools import islice

from ptq.data.chat import Document, document_of

HUB_DOCUMENTS = 4096


@dataclass(frozen=True)
class Preset:
    """`splits`: split -> the files to read, None for all; the first split is the default.  `rows`: how many, None for all.

    `join`: rows become one document with this between them; None: a row is a document.
    """

    dataset: str
    splits: dict[str, str | None]
    config: str | None = None
    rows: int | None = HUB_DOCUMENTS
    join: str | None = field(default=None)


PRESETS = {
    # One text, as the GPTQ paper's code makes it; its rows are lines, most of them empty.
    "wikitext": Preset(
        "Salesforce/wikitext", {"train": None, "validation": None, "test": None}, "wikitext-2-raw-v1", rows=None, join="\n\n"
    ),
    # The first file of each split: the whole has 1024 and 8.
    "c4": Preset(
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "ultrachat": Preset("HuggingFaceH4/ultrachat_200k", {"train_sft": None, "test_sft": None}),
    "pile": Preset("NeelNanda/pile-10k", {"train": None}),
}


def find_preset(source: str) -> tuple[Preset, str] | None:
    """(what to load, split) of a name, None for what is no dataset's.  Raises ValueError for a split that a preset lacks."""
    name, *rest = source.split(":")
    if name in PRESETS:
        split = rest[0] if rest else next(iter(PRESETS[name].splits))
        if split not in PRESETS[name].splits or len(rest) > 1:
            raise ValueError(f"text {source!r}: {name} has the splits {', '.join(PRESETS[name].splits)}")
        return PRESETS[name], split
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and len(rest) <= 2:
        config, split = (rest[0] or None if rest else None), (rest[1] if len(rest) == 2 else "train")
        return Preset(name, {split: None}, config), split
    return None


def hub_documents(source: str, preset: Preset, split: str) -> list[Document]:
    """The documents, streamed.  Raises ValueError where the dataset cannot be loaded, and for a row without text."""
    from datasets import load_dataset

    file = preset.splits[split]
    options = {"data_files": {split: file}} if file else {"name": preset.config}
    try:
        stream = load_dataset(preset.dataset, split=split, streaming=True, **options)  # type: ignore[arg-type]
        rows = list(islice(stream, preset.rows))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"text {source!r} is no file here, and as a dataset it cannot be loaded: {reason}") from None
    documents: list[Document] = []
    for row in rows:
        document = document_of(row)
        if document is None:
            columns = ", ".join(row)
            raise ValueError(
                f'dataset {preset.dataset!r} has no column "text", nor "messages" with role and content; its columns are {columns}'
            )
        documents.append(document)
    return documents if preset.join is None else [preset.join.join(map(str, documents))]
