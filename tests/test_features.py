"""Features of a corpus: the tokens and embeddings that synthesis would take from the same clips."""

import functools
import shutil

import fill
import fixture_data
import jax
import numpy as np
import pytest
import tiny_model

from deepasmr_jax import audio, checkpoint, clip, speaker_campplus, synthesis


def with_campplus(folder):
    """The tiny model with a small CAM++ in place of its speaker encoder, and without a pool."""
    shutil.copytree(tiny_model.shared(), folder)
    (folder / "pool.safetensors").unlink()
    cfg = speaker_campplus.Config(
        head_channels=2, initial_channels=8, growth=4, bottleneck=4, repeats=(2,), dilations=(1,), embedding_size=16
    )  # fmt: skip
    shapes = jax.eval_shape(functools.partial(speaker_campplus.init, cfg), jax.random.key(0))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: fill.values(fill.path_name(path), x.shape, 0).astype(x.dtype), shapes
    )
    checkpoint.export_component(folder, "speaker", weights, cfg)
    return folder


@pytest.mark.parametrize("encoder", ["resnet", "campplus"])
def test_features_and_synthesis_hear_a_clip_alike(tmp_path, encoder):
    folder = with_campplus(tmp_path / "model") if encoder == "campplus" else tiny_model.shared()
    # what synthesis leaves of a clip: trimmed, and a whole number of tokens
    wav = clip.read(tiny_model.buzz(2.0), tiny_model.RATE, tiny_model.RATE, notes=[]).wav
    wav = wav[: len(wav) // audio.TOKEN_SAMPLES * audio.TOKEN_SAMPLES]
    made = synthesis.Synthesizer(folder) if encoder == "campplus" else tiny_model.synthesizer()
    heard = made.read_clip(wav, tiny_model.RATE)
    [found] = fixture_data.add_features_module().Extractor(str(folder), "mini", 2)([wav])
    np.testing.assert_array_equal(found["speech_tokens"], heard.tokens)
    np.testing.assert_allclose(found["mel"], heard.mel, atol=1e-2)  # float16
    scale = np.abs(heard.embedding).max()
    np.testing.assert_allclose(found["speaker_embedding"], heard.embedding, atol=1e-4 * scale)
    if encoder == "campplus":  # the front end of the other encoders would give something else
        module, cfg = checkpoint.load_component(folder, "speaker")
        frames = audio.fbank_frames(np.array([len(wav)]))
        other = speaker_campplus.embed(module, cfg, audio.fbank(wav[None]), frames)[0]
        assert np.abs(other - heard.embedding).max() > 0.01 * scale


def test_clips_beyond_the_window_of_the_tokenizer_get_all_their_tokens():
    folder = str(tiny_model.shared())
    tools = fixture_data.add_features_module()
    wav = np.concatenate([tiny_model.hiss(4.0, seed=i) for i in range(9)])  # 36 s
    short = tiny_model.buzz(1.5)
    found = tools.Extractor(folder, "mini", 2)([wav, short])
    tokenizer, cfg = checkpoint.load_component(folder, "speech_tokenizer")
    file = checkpoint.model_file("speech_tokenizer")
    log_mel = np.asarray(audio.s3_log_mel(wav[None]))[0]
    expected = file.encode_long(tokenizer, cfg, log_mel)
    assert len(found[0]["speech_tokens"]) == len(expected) == 36 * audio.TOKEN_RATE
    # sums of another padded length may turn a digit that lies on its rounding limit
    assert np.mean(found[0]["speech_tokens"] == expected) > 0.99
    assert len(found[0]["mel"]) == 2 * len(expected)
    assert len(found[1]["speech_tokens"]) == -(-150 // 4)
