"""A tokenizer.json as llama.cpp wants it: tokens, their kinds, and merges or scores.

Two kinds exist among Llamas: byte-level BPE, whose split into words llama.cpp knows by name only, and BPE made from a
sentencepiece model.  For the second llama.cpp merges by score, the highest first; here a token's score is minus the rank of the
merge that makes it, which is the order tokenizers merges in.

Sources: llama.cpp's conversion/base.py, as of llama-cpp-python 0.3.36; gguf 0.19's SpecialVocab writes merges, special tokens
and the chat template.
"""

import json
from pathlib import Path

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # how text is split before merging -> llama.cpp's name for it
    (("Split", WORDS % "{1,3}"), ("ByteLevel", False)): "llama-bpe",
    (("Split", WORDS % ""), ("ByteLevel", False)): "qwen2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}


def add_tokenizer(writer, folder: Path, vocab_size: int) -> None:
    """A folder without tokenizer.json gives a file for token ids only.  Raises ValueError for kinds llama.cpp has no name for."""
    import gguf

    path = folder / "tokenizer.json"
    if not path.exists():
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = json.loads(path.read_text())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{path} is a {model['type']} tokenizer; llama.cpp's Llamas have BPE: choose another layout")
    tokens, kinds = vocabulary(tokenizer, vocab_size)
    split = split_of(tokenizer)
    if split:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(llama_name(split, path))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores(model, tokens))
        writer.add_add_space_prefix("Prepend" in json.dumps(tokenizer.get("normalizer")))
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType[kind] for kind in kinds])
    gguf.SpecialVocab(folder, load_merges=bool(split), n_vocab=vocab_size).add_to_gguf(writer)


def vocabulary(tokenizer: dict, size: int) -> tuple[list[str], list[str]]:
    """Tokens by id, and gguf's name of each one's kind; ids without a token are filled up."""
    by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    kinds = {number: "BYTE" if token.startswith("<0x") and len(token) == 6 else "NORMAL" for number, token in by_id.items()}
    for added in tokenizer.get("added_tokens", []):
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = "CONTROL" if added["special"] else "USER_DEFINED"
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [kinds.get(number, "UNUSED") for number in range(size)]


def split_of(tokenizer: dict) -> tuple[tuple[str, object], ...]:
    """The byte-level pre-tokenizer as the keys of SPLITS have it; empty where there is none (sentencepiece)."""
    before = tokenizer.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before] if before else [])
    said = {"Split": lambda p: p["pattern"].get("Regex"), "Digits": lambda p: p["individual_digits"]}
    split = tuple((p["type"], said.get(p["type"], lambda p: p.get("use_regex", True))(p)) for p in parts)
    return split if any(kind == "ByteLevel" for kind, _ in split) else ()


def llama_name(split: tuple[tuple[str, object], ...], path: Path) -> str:
    if split not in SPLITS:
        raise ValueError(f"{path} splits text by {split}, for which no name of llama.cpp is known here: choose another layout")
    return SPLITS[split]


def scores(model: dict, tokens: list[str]) -> list[float]:
    """Minus the rank of the merge that makes each token; lowest of all for those that no merge makes."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(rank))) for token in tokens]
