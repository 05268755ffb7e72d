"""Files against each other: index, headers, sizes, hashes, tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path

from ptq.export.finding import ERROR, NOTE, WARNING, Finding
from ptq.export.index import INDEX, header
from ptq.export.manifest import MANIFEST, hashes, read_manifest
from ptq.export.reader import read_json

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
AGAIN = "copy it again"


def check_files(folder: Path) -> Iterator[Finding]:
    """What is cut off, missing or left over."""
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            about = header(path)
        except (ValueError, OverflowError):
            yield Finding(ERROR, path.name, "its header cannot be read", AGAIN)
            continue
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        due = start + max((entry["data_offsets"][1] for entry in about.values()), default=0)
        if path.stat().st_size != due:
            yield Finding(ERROR, path.name, f"it has {path.stat().st_size} bytes and its header says {due}", AGAIN)
        for name in about.keys() & names.keys():
            yield Finding(ERROR, name, f"it is in {names[name]} and in {path.name}", "remove the file that is left over")
        names |= dict.fromkeys(about, path.name)
    yield from check_index(folder, names)


def check_index(folder: Path, names: dict[str, str]) -> Iterator[Finding]:
    index = read_json(folder / INDEX)
    if not index:
        if len(set(names.values())) > 1:
            yield Finding(
                ERROR, INDEX, "there are several files and no index", "write the index: transformers reads none without"
            )
        return
    listed = index.get("weight_map", {})
    for file in sorted(set(listed.values()) - {path.name for path in folder.glob("*.safetensors")}):
        yield Finding(ERROR, file, "the index names it and it is not there", AGAIN)
    for name in sorted(listed):
        if name not in names and (folder / listed[name]).exists():
            yield Finding(ERROR, name, f"the index has it in {listed[name]}, which does not hold it", AGAIN)
        elif name in names and names[name] != listed[name]:
            yield Finding(
                ERROR, name, f"the index has it in {listed[name]}, and it is in {names[name]}", "write the index again"
            )
    for name in sorted(names.keys() - listed.keys()):
        yield Finding(ERROR, name, f"it is in {names[name]} and not in the index", "write the index again")
    size = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for file in set(names.values())
        for entry in header(folder / file).values()
    )
    said = index.get("metadata", {}).get("total_size")
    if said is not None and said != size:
        yield Finding(NOTE, INDEX, f"total_size is {said} and the tensors have {size} bytes", "write the index again")


def check_tokenizer(folder: Path) -> Iterator[Finding]:
    if not any((folder / name).exists() for name in TOKENIZERS):
        remedy = "copy the model's tokenizer into the folder"
        yield Finding(WARNING, "tokenizer.json", "there is no tokenizer, and engines look for it beside the weights", remedy)
    inside = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not inside and not any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        remedy = "copy the model's, if it has one; a base model has none"
        yield Finding(NOTE, "chat_template.jinja", "there is no chat template, so chat requests are refused", remedy)


def check_manifest(folder: Path) -> Iterator[Finding]:
    """Every tensor against its hash, where there is a manifest; reads all tensors once."""
    try:
        listed = read_manifest(folder)
    except (json.JSONDecodeError, KeyError):
        yield Finding(ERROR, MANIFEST, "it cannot be read", "write it again from a copy that is known to be good")
        return
    if listed is None:
        return
    found = {name: digest for name, _, digest in hashes(folder)}
    for name in sorted(listed.keys() - found.keys()):
        yield Finding(ERROR, name, f"{MANIFEST} lists it and it is not there", AGAIN)
    for name in sorted(found.keys() - listed.keys()):
        yield Finding(ERROR, name, f"it is there and {MANIFEST} does not list it", "remove it, or write the manifest again")
    for name, digest in sorted(found.items()):
        if name in listed and listed[name]["blake2b"] != digest:
            yield Finding(ERROR, name, f"its bytes are not those that {MANIFEST} has the hash of", AGAIN)
