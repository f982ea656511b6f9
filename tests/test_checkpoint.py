"""The public model folder and the training checkpoints: round trips, damage, and what the errors say."""

import dataclasses
import errno
import functools
import json
import os
import shutil
from pathlib import Path

import bad_files
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepasmr_jax import checkpoint, doctor, lm, speech_tokenizer, vocoder_istft

LM = lm.Config(
    text_vocab=20, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16, num_codes=27
)


@pytest.fixture(scope="module")
def arrays():
    from deepasmr_jax import sharding

    sharding.make_mesh()
    return lm.init(LM, jax.random.key(0))


def all_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---------------------------------------------------------------- public folder


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_an_exported_component_loads_as_it_was_rounded(tmp_path, arrays, dtype):
    checkpoint.export_component(tmp_path / "m", "lm", arrays, LM, dtype)
    module, cfg = checkpoint.load_component(tmp_path / "m", "lm")
    assert cfg == LM and isinstance(module, lm.SpeechLM)
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), arrays)
    assert all_equal(module, expected)
    assert module.speech_table[...].sharding.spec == arrays.speech_table[...].sharding.spec


def test_components_are_merged_and_top_level_dicts_too(tmp_path, arrays):
    tokenizer = speech_tokenizer.Config(width=8, num_heads=2, num_blocks=1, mlp_width=8)
    checkpoint.export_component(
        tmp_path, "lm", arrays, LM, mel_profile="mini", provenance={"lm": {"steps": 1}}
    )
    weights = speech_tokenizer.init(tokenizer, jax.random.key(1))
    checkpoint.export_component(tmp_path, "speech_tokenizer", weights, tokenizer, provenance={"x": {}})
    values = checkpoint.read_config(tmp_path)
    assert sorted(values["components"]) == ["lm", "speech_tokenizer"]
    assert values["mel_profile"] == "mini" and values["provenance"] == {"lm": {"steps": 1}, "x": {}}
    assert values["components"]["lm"]["num_params"] == sum(x.size for x in jax.tree.leaves(arrays))
    assert not [p for p in os.listdir(tmp_path) if "tmp" in p]


def test_of_a_gan_only_the_generator_is_exported(tmp_path):
    cfg = vocoder_istft.Config(
        width=8, mlp_width=8, num_layers=1, adversarial=True, periods=(2,), period_channels=(4,),
        spectrogram_sizes=(256,), spectrogram_channels=(4,),
    )  # fmt: skip
    gan = vocoder_istft.init(cfg, jax.random.key(0))
    checkpoint.export_component(tmp_path, "vocoder", gan, cfg)
    module, _ = checkpoint.load_component(tmp_path, "vocoder")
    assert isinstance(module, vocoder_istft.Generator)
    assert all_equal(module, gan.generator)


def test_the_recognition_head_is_not_exported(tmp_path):
    cfg = speech_tokenizer.Config(
        width=8, num_heads=2, num_blocks=1, mlp_width=8, has_head=True, head_width=8
    )
    model = speech_tokenizer.init(cfg, jax.random.key(0))
    checkpoint.export_component(tmp_path, "speech_tokenizer", model, cfg)
    module, found = checkpoint.load_component(tmp_path, "speech_tokenizer")
    assert module.head is None and not found.has_head
    assert all_equal(module.encoder, model.encoder)


def test_missing_unexpected_and_reshaped_names_are_in_one_error(tmp_path, arrays):
    named = {k: np.asarray(v) for k, v in checkpoint.named_arrays(arrays).items()}
    named["norm.scael"] = named.pop("norm.scale")
    named["marker_table"] = named["marker_table"][:1]
    with pytest.raises(ValueError) as error:
        checkpoint.fill(arrays, named, "some file")
    message = str(error.value)
    assert "missing ['norm.scale']" in message and "unexpected ['norm.scael']" in message
    assert "marker_table (1, 8) instead of (2, 8)" in message and "some file" in message


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage, words", [(damage_truncate, "is damaged"), (damage_flip, "is damaged"), (os.remove, "is missing")]
)
def test_a_damaged_truncated_or_missing_weight_file_is_refused_by_name(tmp_path, arrays, damage, words):
    path = checkpoint.export_component(tmp_path, "lm", arrays, LM)
    damage(path)
    with pytest.raises(ValueError, match=f"lm.safetensors {words}"):
        checkpoint.load_component(tmp_path, "lm")


def test_a_truncated_file_without_a_recorded_sum_is_refused_too(tmp_path, arrays):
    path = checkpoint.export_component(tmp_path, "lm", arrays, LM)
    damage_truncate(path)
    with pytest.raises(ValueError, match="cut off or damaged"):
        checkpoint.read_arrays(path)


def test_a_folder_without_config_or_component_or_of_another_format_is_refused(tmp_path, arrays):
    with pytest.raises(ValueError, match="has no config.json"):
        checkpoint.load_component(tmp_path, "lm")
    checkpoint.export_component(tmp_path, "lm", arrays, LM)
    with pytest.raises(ValueError, match="no component 'flow'; it has lm"):
        checkpoint.load_component(tmp_path, "flow")
    values = json.loads((tmp_path / "config.json").read_text()) | {"format": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has format 2"):
        checkpoint.load_component(tmp_path, "lm")
    (tmp_path / "config.json").write_text('{"component": "lm", "steps": 3}')  # as a run writes it
    with pytest.raises(
        ValueError, match="is the folder of a run; give .*export if it is there, or the folder"
    ):
        checkpoint.load_component(tmp_path, "lm")
    for content in (b"{", b"[1]", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="config.json is damaged .*; copy the whole model folder again"):
            checkpoint.load_component(tmp_path, "lm")


def test_weights_that_overflow_the_file_type_are_refused_by_name(tmp_path, arrays):
    big = jax.tree.map(lambda x: x, arrays)
    big.norm.scale[...] = jnp.full(8, 1e6)
    with pytest.raises(ValueError, match="norm.scale is not finite in float16"):
        checkpoint.export_component(tmp_path, "lm", big, LM, "float16")
    assert not os.path.exists(tmp_path / "lm.safetensors")


def test_an_interrupted_export_leaves_the_old_weights_readable(tmp_path, arrays, monkeypatch):
    checkpoint.export_component(tmp_path, "lm", arrays, LM)

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.export_component(tmp_path, "lm", lm.init(LM, jax.random.key(9)), LM)
    module, _ = checkpoint.load_component(tmp_path, "lm")
    assert all_equal(module, arrays)


def test_weights_in_several_files_are_one_component(tmp_path, arrays, monkeypatch):
    folder = tmp_path / "m"
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2000)
    checkpoint.export_component(folder, "lm", arrays, LM)
    names = [file for file, _ in checkpoint.files_of(checkpoint.read_config(folder)["components"]["lm"])]
    assert len(names) > 2 and names[1] == f"lm-00002-of-{len(names):05d}.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "config.json"])
    assert all_equal(checkpoint.load_component(folder, "lm")[0], arrays)
    assert [(r["file"], r["state"]) for r in doctor.examine(folder)] == [(n, "whole") for n in names]

    second, old = folder / names[1], (folder / names[1]).read_bytes()
    for harm, state in ((second.unlink, "missing"), (lambda: second.write_bytes(old[:-1] + b"?"), "damaged")):
        harm()
        assert [r["file"] for r in doctor.examine(folder) if r["state"] == state] == [names[1]]
        with pytest.raises(ValueError, match=rf"{names[1]} is {state}"):
            checkpoint.load_component(folder, "lm")
    second.write_bytes(old)

    other = lm.init(LM, jax.random.key(9))
    for size in (2000, 4000):  # the disk fills up in the second of as many files, and of fewer
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", size)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            bad_files.fill_the_disk(patch, "lm-00002-of", room=100)
            checkpoint.export_component(folder, "lm", other, LM)
        assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "config.json"])
        assert all_equal(checkpoint.load_component(folder, "lm")[0], arrays)

    for size, count in ((4000, None), (2**30, 1)):  # fewer files, then one: none of the others stays
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", size)
        checkpoint.export_component(folder, "lm", other, LM)
        left = [file for file, _ in checkpoint.files_of(checkpoint.read_config(folder)["components"]["lm"])]
        assert len(left) < len(names) and len(left) == (count or len(left))
        assert sorted(p.name for p in folder.iterdir()) == sorted([*left, "config.json"])
        assert all_equal(checkpoint.load_component(folder, "lm")[0], other)
        names = left


# ---------------------------------------------------------------- training checkpoints


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "model", "key", "ema"], meta_fields=[]
)
@dataclasses.dataclass
class State:
    step: jax.Array
    model: object
    key: jax.Array
    ema: object


def make_state(step, seed=0):
    return State(jnp.int32(step), lm.init(LM, jax.random.key(seed)), jax.random.key(seed), None)


def make_data():
    return iter(grain.MapDataset.range(100).batch(2).to_iter_dataset(grain.ReadOptions(1, 1)))


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 1, 2, 3, whose data stood at batch 1, 2, 3."""
    data = make_data()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        next(data)
        checkpoints.save(step, make_state(step, seed=step), data)
    checkpoints.close()
    return tmp_path


def restore(folder):
    data = make_data()
    checkpoints = checkpoint.Checkpoints(folder)
    found = checkpoints.restore(checkpoint.abstract(make_state, 0), data)
    checkpoints.close()
    return found, data


def test_the_newest_checkpoint_comes_back_with_key_and_data_position(run):
    (step, state), data = restore(run)
    assert step == 3 and int(state.step) == 3
    assert all_equal(state.model, make_state(3, seed=3).model)
    assert jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(3)))
    assert next(data).tolist() == [6, 7]


def damage_marker(path):
    os.remove(path / "commit_success.txt")


def damage_weights(path):
    shutil.rmtree(path / "state" / "d")


def damage_manifest(path):
    (path / "state" / "manifest.ocdbt").write_bytes(b"broken")


def damage_position(path):
    for file in (path / "data").glob("process_*.json"):
        file.write_text("{")


@pytest.mark.parametrize("damage", [damage_marker, damage_weights, damage_manifest, damage_position])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(run, damage, capsys):
    damage(run / "checkpoints" / "3")
    (step, state), data = restore(run)
    assert step == 2 and all_equal(state.model, make_state(2, seed=2).model)
    assert next(data).tolist() == [4, 5]
    assert "checkpoint of step 3 is damaged and skipped" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_nothing(run):
    for step in ("1", "2", "3"):
        damage_marker(run / "checkpoints" / step)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        restore(run)


def test_a_folder_without_checkpoints_restores_nothing(tmp_path):
    found, data = restore(tmp_path)
    assert found is None and next(data).tolist() == [0, 1]


def test_where_folders_cannot_be_renamed_a_marker_makes_a_checkpoint_whole(tmp_path, monkeypatch, capsys):
    def refuse(function):
        def rename(source, *rest, **options):
            if Path(source).is_dir():
                raise OSError(errno.EMFILE, "too many open files")  # of gcsfuse, on a bucket without folders
            return function(source, *rest, **options)

        return rename

    for name in ("rename", "replace", "renames"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    data, checkpoints = make_data(), checkpoint.Checkpoints(tmp_path / "plain")
    with pytest.raises(OSError, match="step 1 could not be written .*too many open files"):
        checkpoints.save(1, make_state(1), data, wait=True)
    monkeypatch.setattr(checkpoint, "is_fuse", lambda folder: True)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        next(data)
        checkpoints.save(step, make_state(step, seed=step), data)
    checkpoints.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]
    damage_marker(tmp_path / "checkpoints" / "3")  # killed before the marker
    (step, state), data = restore(tmp_path)
    assert step == 2 and all_equal(state.model, make_state(2, seed=2).model) and next(data).tolist() == [4, 5]
    # Orbax clears it away in the background, as it does with the unfinished ones of other folders
    told = "checkpoint of step 3 is damaged" in capsys.readouterr().out
    assert told or not (tmp_path / "checkpoints" / "3").exists()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3, seed=5), data)  # and again, in its place
    checkpoints.close()
    (step, state), _ = restore(tmp_path)
    assert step == 3 and all_equal(state.model, make_state(3, seed=5).model)


@pytest.mark.parametrize(
    "kind, expected", [("fuse.gcsfuse", True), ("fuse", True), ("ext4", False), (None, False)]
)
def test_a_mounted_bucket_is_known_by_its_mount(tmp_path, monkeypatch, kind, expected):
    def read_text(self):
        assert str(self) == "/proc/self/mounts"
        if kind is None:  # not Linux
            raise FileNotFoundError(self)
        return (
            f"overlay / overlay rw 0 0\nbucket {tmp_path}/a\\040b {kind} rw 0 0\nx {tmp_path} tmpfs rw 0 0\n"
        )

    monkeypatch.setattr(Path, "read_text", read_text)
    assert checkpoint.is_fuse(tmp_path / "a b" / "run") == expected
    assert not checkpoint.is_fuse(tmp_path / "a")


def test_only_the_wanted_number_of_checkpoints_is_kept(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, keep_every=4)
    data = make_data()
    for step in range(1, 9):
        checkpoints.save(step, make_state(step), data)
    checkpoints.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 7, 8]


def test_weights_of_a_run_are_read_by_name_without_its_config(run):
    found = checkpoint.load_weights(run)
    expected = checkpoint.named_arrays(make_state(3, seed=3).model)
    assert sorted(found) == sorted(expected)
    assert all(np.array_equal(found[k], expected[k]) for k in expected)


def test_a_module_with_a_list_of_modules_comes_back(tmp_path):
    def make(key):
        return nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(k)) for k in jax.random.split(key, 12)])

    data, checkpoints = make_data(), checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, make(jax.random.key(0)), data)
    step, found = checkpoints.restore(checkpoint.abstract(make, jax.random.key(1)), data)
    assert step == 1 and all_equal(found, make(jax.random.key(0)))


def test_the_built_in_weights_and_pool_are_at_most_40_mb():
    folder = Path(checkpoint.__file__).parent / "mini"
    names = [entry["file"] for entry in checkpoint.read_config(folder)["components"].values()]
    files = sorted(folder.rglob("*.safetensors"))
    assert [f.name for f in files] == sorted([*names, "pool.safetensors"])
    assert sum(f.stat().st_size for f in files) <= 40e6
