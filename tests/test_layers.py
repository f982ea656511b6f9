"""The package's import layers: a module imports only from layers above its own, and stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepasmr_jax"
LAYERS = [
    {"files", "weight_tensors", "hlo"},
    {"config", "audio", "programs", "text_normalize", "weight_torch", "weight_onnx", "public_names"},
    {"sharding", "metrics", "shards", "text", "page", "clip", "weight_files"}
    | {"public_cosyvoice2", "public_models"},
    {"request", "nn", "pitch"},
    {"ode", "vocoder_parts"},
    {"speech_tokenizer", "lm", "flow", "flow_cosyvoice2", "vocoder", "vocoder_istft", "vocoder_hift"}
    | {"speaker", "speaker_campplus", "speaker_wavlm", "recognizer"},
    {"input_pipeline", "checkpoint", "pool", "decoding", "results"},
    {"judges", "samples", "public_files"},
    {"train", "synthesis", "evaluate"},
    {"pool_building"},
    {"batch", "demo", "convert", "doctor", "data_check", "plan"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__"))
HEAVY = {"librosa", "tensorflow_datasets", "transformers", "torch", "matplotlib", "pocketsphinx"}


def imports(name: str, top_level_only: bool = False) -> set[str]:
    """Dotted names imported by a module of the package."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_the_layers_name_every_module_and_no_other():
    assert set(LEVEL) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_only_from_layers_above(name):
    for target in imports(name):
        parts = target.split(".")
        if parts[0] == "deepasmr_jax" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] < LEVEL[name], f"{name} (layer {LEVEL[name]}) imports {parts[1]}"
        assert parts[0] not in ("configs", "data", "launch", "tests"), f"{name} imports {target}"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_are_imported_inside_functions(name):
    heavy = {target for target in imports(name, top_level_only=True) if target.split(".")[0] in HEAVY}
    assert not heavy, f"{name} imports {heavy} at module level"


def test_only_checkpoint_imports_orbax():
    users = {name for name in MODULES if any(t.split(".")[0] == "orbax" for t in imports(name))}
    assert users == {"checkpoint"}


def test_importing_the_language_model_does_not_import_data_or_audio_libraries():
    code = (
        "import sys, deepasmr_jax.lm; "
        "print([m for m in ('grain', 'librosa', 'tensorflow_datasets', 'orbax', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
