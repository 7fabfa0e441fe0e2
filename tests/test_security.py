"""Nothing found in a file ever runs: the sources are searched for what could, and each kind of file holds a trap."""

import ast
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae.data import index
from mae.data.indexing import open_index
from mae.data.store.shards import expand
from mae.errors import UserError
from mae.models.description import read_description
from mae.models.weights import read_weights
from mae.run_files import MANIFEST_FILE
from mae.settings import parse
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.checkpoints.manifest import (
    BadCheckpointError,
    DataPosition,
    FileIdentity,
    Manifest,
    RunPosition,
    step_folder,
)
from mae.training.checkpoints.reader import newest_checkpoint, verify_checkpoint
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.run_folder.folder import RunFolder

ROOT = Path(__file__).parent.parent
FOLDERS = ("mae", "pipelines", "configs", "benchmarks", "examples")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Modules whose very purpose is to turn bytes into code or into any object.
MODULES = {
    "_pickle", "cloudpickle", "code", "dill", "joblib", "jsonpickle", "marshal", "pickle", "pty", "runpy", "shelve",
}  # fmt: skip
CALLS = {
    "__import__", "compile", "eval", "exec",
    "os.popen", "os.system", "subprocess.getoutput", "subprocess.getstatusoutput",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "timm.models.load_checkpoint",
    "yaml.full_load", "yaml.full_load_all", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
FAMILIES = ("os.exec", "os.spawn", "os.posix_spawn")
# Arguments that open the door in whatever function takes them.
SWITCHES = {"allow_pickle", "shell", "trust_remote_code"}
# An export to transformers runs mae/export/modeling_mae.py, which it has just written, to compare its outputs.
ALLOWED = {"mae/export/transformers_code.py": ["trust_remote_code"]}
SUBPROCESS = {f"subprocess.{name}" for name in ("Popen", "call", "check_call", "check_output", "run")}
SAFE_LOADERS = {"yaml.CSafeLoader", "yaml.SafeLoader"}


def unsafe(source: str) -> Iterator[str]:
    """What in a module could run or unpickle something that it was given, one word each."""
    tree = ast.parse(source)
    origins = dict(_imported(tree))
    loaders = SAFE_LOADERS | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and {_dotted(base, origins) for base in node.bases} <= SAFE_LOADERS
    }
    for origin in origins.values():
        if origin.partition(".")[0] in MODULES:
            yield origin
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _unsafe_call(node, origins, loaders)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            # Also where it is only handed on, as in map(eval, texts).
            name = _dotted(node, origins)
            if name in CALLS or name.startswith(FAMILIES):
                yield name


def _unsafe_call(call: ast.Call, origins: dict[str, str], loaders: set[str]) -> Iterator[str]:
    name = _dotted(call.func, origins)
    given = {word.arg: word.value for word in call.keywords}
    if None in given and name in {"numpy.load", "torch.load", "yaml.load", *SUBPROCESS}:
        yield f"{name}(**)"
    for switch in SWITCHES & given.keys():
        if not _is(given[switch], False):
            yield switch
    if "weights_only" in given and not _is(given["weights_only"], True):
        yield "weights_only"
    if name == "torch.load" and "weights_only" not in given:
        yield "torch.load"
    if name == "numpy.load" and len(call.args) > 2:
        yield "numpy.load"
    if name == "yaml.load":
        loader = call.args[1] if len(call.args) > 1 else given.get("Loader")
        if loader is None or _dotted(loader, origins) not in loaders:
            yield "yaml.load"
    if name in SUBPROCESS and not isinstance(call.args[0] if call.args else given.get("args"), ast.List | ast.Tuple):
        yield name


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in this module, what it stands for) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
                yield f" {alias.name}", alias.name  # as a module, whatever it is called here
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr, origins: dict[str, str]) -> str:
    """`t.load` -> "torch.load" where t is torch; "" for what is no plain name."""
    if isinstance(node, ast.Name):
        return origins.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value, origins)):
        return f"{base}.{node.attr}"
    return ""


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_or_unpickle_what_it_reads_x04_x02(path: Path) -> None:
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), [])
    assert list(unsafe(path.read_text(encoding="utf-8"))) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch, pickle as p",
        "from pickle import loads",
        "from marshal import loads as read",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import torch\ntorch.load(path, **options)",
        "import torch.hub\ntorch.hub.load(repository, name)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, None, True)",
        "import numpy as np\nnp.load(path, allow_pickle=not safe)",
        "eval(text)",
        "map(eval, texts)",
        "exec(text)",
        "compile(text, name, 'exec')",
        "__import__(name)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
        "import yaml\nclass Loader(yaml.FullLoader): pass\nyaml.load(text, Loader=Loader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "model(name, trust_remote_code=True)",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import subprocess\nsubprocess.run('ls -l')",
        "import subprocess\nsubprocess.run(f'ls {folder}')",
        "from subprocess import Popen\nPopen(command)",
        "import subprocess\nsubprocess.getoutput(command)",
        "import os\nos.system(command)",
        "import os\nos.popen(command)",
        "from os import system as do\ndo(command)",
        "import os\nos.execvp(program, words)",
    ],
)
def test_the_search_finds_what_is_unsafe(source: str) -> None:
    assert list(unsafe(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import torch\ntorch.compile(model)",
        "import re\nre.compile(text)",
        "model.eval()",
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nclass Strict(yaml.SafeLoader): pass\nyaml.load(text, Loader=Strict)",
        "import numpy as np\nnp.load(file, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['nvidia-smi', '-L'], check=True)",
        "from safetensors.torch import load_file\nload_file(path)",
    ],
)
def test_the_search_passes_what_is_safe(source: str) -> None:
    assert list(unsafe(source)) == []


class _Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (Path(self.canary),)


def _pickled(canary: Path) -> bytes:
    return pickle.dumps(_Trap(canary))


def _saved_by_torch(canary: Path) -> bytes:
    path = canary.with_name("trap.pt")
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(2), "optimizer": _Trap(canary)}, path)
    data = path.read_bytes()
    path.unlink()
    return data


def _behind_a_safetensors_header(canary: Path) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + _pickled(canary)


def _tagged_yaml(canary: Path) -> bytes:
    return f"run_dir: !!python/object/apply:os.mkdir ['{canary}']\n".encode()


TRAPS = {
    "pickle": _pickled,
    "torch.save": _saved_by_torch,
    "safetensors": _behind_a_safetensors_header,
    "yaml": _tagged_yaml,
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The folder that appears if a trap snaps."""
    return tmp_path / "canary"


@pytest.mark.parametrize(
    ("name", "careless"),
    [
        ("pickle", "import pickle; pickle.loads(data)"),
        ("torch.save", "import io, torch; torch.load(io.BytesIO(data), weights_only=False)"),
        ("yaml", "import yaml; yaml.unsafe_load(data)"),
    ],
)
def test_the_traps_do_snap(name: str, careless: str, canary: Path) -> None:
    exec(careless, {"data": TRAPS[name](canary)})
    assert canary.is_dir()


@pytest.mark.parametrize("trap", TRAPS)
def test_malicious_weights_are_refused_and_never_unpickled_x03(trap: str, canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(TRAPS[trap](canary))
    for read in (read_weights, read_description):
        with pytest.raises(UserError, match="is not an intact safetensors file"):
            read(path)
    assert not canary.exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_malicious_index_is_made_anew_and_never_unpickled_x03(
    trap: str, canary: Path, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards, cache = str(make_shards([3, 2])), tmp_path / "cache"
    before = open_index([shards], cache)
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix in (".json", ".bin")]
    assert len(files) >= 2
    for path in files:
        path.write_bytes(TRAPS[trap](canary))
        with pytest.raises(index.StaleIndexError):
            index.load(before.folder, expand([shards]))
        assert open_index([shards], cache).fingerprint == before.fingerprint
    assert not canary.exists()


@pytest.mark.parametrize("schema", [PretrainSettings, FinetuneSettings])
@pytest.mark.parametrize("trap", TRAPS)
def test_malicious_settings_are_refused_and_never_run_x03(
    schema: type[PretrainSettings], trap: str, canary: Path, tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(TRAPS[trap](canary))
    with pytest.raises(UserError, match=r"settings\.yaml (is not valid YAML|cannot be read)"):
        parse(schema, ["--config", str(path)], prog="mae")
    assert not canary.exists()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with all its files."""
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=1, background=False)
    groups = {group: {"blocks.0.attn.qkv.weight": torch.zeros(2)} for group in ("model", "optimizer", "ema")}
    position = DataPosition(8, "fingerprint", 8)
    writer.save(groups, {}, RunPosition(1, position, {}, {}))
    writer.close()
    return step_folder(tmp_path / "checkpoints", 1)


def _agree(folder: Path) -> None:
    """Make the manifest say that the files are as they should be, as whoever plants them would."""
    path = folder / MANIFEST_FILE
    files = {file.name: FileIdentity.of(file) for file in folder.iterdir() if file != path}
    path.write_bytes(replace(Manifest.from_json(path.read_bytes()), files=files).to_json())


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "manifest.json"])
def test_a_malicious_checkpoint_is_refused_and_never_unpickled_x03(
    name: str, trap: str, canary: Path, saved: Path
) -> None:
    (saved / name).write_bytes(TRAPS[trap](canary))
    if name != MANIFEST_FILE:
        _agree(saved)
    with pytest.raises(BadCheckpointError, match=name):
        verify_checkpoint(saved)
    with pytest.raises(UserError, match=f"no checkpoint .* is intact .*{name}"):
        newest_checkpoint(saved.parent, report=lambda text: None)
    assert not canary.exists()


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "random_states_0.pkl"])
def test_a_file_of_another_kind_in_a_checkpoint_is_refused_and_never_unpickled_x03(
    name: str, trap: str, canary: Path, saved: Path
) -> None:
    (saved / name).write_bytes(TRAPS[trap](canary))
    for _ in ("planted", "planted and listed"):
        with pytest.raises(BadCheckpointError, match=name):
            verify_checkpoint(saved)
        _agree(saved)
    assert not canary.exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_malicious_run_folder_is_refused_and_never_unpickled_x03(trap: str, canary: Path, tmp_path: Path) -> None:
    settings = parse(PretrainSettings, ["--run_dir", str(tmp_path / "run")], prog="mae")
    folder = RunFolder(settings.run_dir)
    folder.create(settings)
    (folder.path / "settings.yaml").write_bytes(TRAPS[trap](canary))
    for read in (lambda: folder.check(settings), lambda: folder.with_its_statistics(settings.data)):
        with pytest.raises(UserError, match=r"settings\.yaml (is not valid YAML|cannot be read)"):
            read()
    assert not canary.exists()
