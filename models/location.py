"""Where the files of a model are, and whether they are what they seem, before transformers looks at them."""

from pathlib import Path

from huggingface_hub import snapshot_download

from ptq.models.configuration import check_config
from ptq.models.gguf_header import check_gguf
from ptq.models.shards import Shards, check_links

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")  # that a model is read from, and *.bin


def locate(source: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, extra arguments of from_pretrained)."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{source}: no such GGUF file")
        check_gguf(path)
        check_adapter(path.parent)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json; give a model folder, a .gguf file or a hub id")
        check_files(path)
        return str(path), {}
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: no such folder; give a model folder, a .gguf file or a hub id")
    return source, {}


def fetch(where: str) -> tuple[Path, str | None]:
    """(folder, None), or of a hub id, whose files are downloaded where they are not there yet, (folder, commit)."""
    if Path(where).is_dir():
        return Path(where), None
    try:
        folder = Path(snapshot_download(where, allow_patterns=list(FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(where, allow_patterns=[*FILES, "*.bin"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be loaded: {str(error).splitlines()[0]}") from None
    check_files(folder)
    return folder, folder.name


def check_files(folder: Path) -> None:
    """Raises ValueError that names a file that is missing, damaged, elsewhere or an adapter's, as Shards, check_links, check_config
    and check_adapter do."""
    check_links(folder, (*FILES, "*.bin"))
    check_adapter(folder)
    check_config(folder, Shards(folder).tensors)


def check_adapter(folder: Path) -> None:
    """Raises ValueError for the config of an adapter: transformers loads the model that it names, with the adapter's weights,
    where a layer read by itself would be the folder's own."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds adapter_config.json, so that transformers would load another model and an adapter to it; merge the "
            "adapter into the weights, or remove the file if that was done"
        )
