"""Speaker encoder: an independent forward's numbers, padding, calibration, the margin loss."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fill import fill

from deepasmr_jax import speaker

GOLDEN = Path(__file__).parent / "golden" / "speaker.npz"
CONFIGS = {  # as in make_speaker.py
    "basic": speaker.Config(base_channels=4, repeats=(1, 3, 1, 1), embedding_size=16),
    "bottleneck": speaker.Config(base_channels=4, repeats=(2, 1, 1, 1), bottleneck=True, embedding_size=16),
}
init = jax.jit(speaker.init, static_argnums=0)
embed = jax.jit(speaker.embed, static_argnums=1)
TINY = speaker.Config(base_channels=4, repeats=(1, 1, 1, 1), embedding_size=16, num_speakers=3)


def leaves(tree, trained=True):
    """Leaves that are trained, or the batch-norm statistics."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    is_trained = [
        not any(getattr(k, "name", getattr(k, "key", "")) in ("mean", "var") for k in p) for p, _ in paths
    ]
    return [x for (_, x), flag in zip(paths, is_trained, strict=True) if flag == trained]


def voices(num_rows, seconds=0.6, seed=0):
    """Stand-in voices: noise in one of three bands, one per speaker, on and off six times a second.

    A steady band would not do: the mean over time, which the front-end removes, would be all of the speaker.
    """
    rng = np.random.default_rng(seed)
    index, num_samples = (np.arange(num_rows) % 3).astype(np.int32), int(16000 * seconds)
    spectrum = np.fft.rfft(rng.standard_normal((num_rows, num_samples)))
    hz = np.linspace(0, 8000, spectrum.shape[1])
    band = np.exp(-0.5 * ((hz - np.asarray([700, 1800, 3500])[index][:, None]) / 300) ** 2)
    turns = 6 * np.arange(num_samples) / 16000 + rng.uniform(0, 1, (num_rows, 1))
    wav = np.fft.irfft(spectrum * band, num_samples) * (np.sin(2 * np.pi * turns) > 0)
    wav = wav + 0.02 * rng.standard_normal(wav.shape)
    wav = (0.2 * wav / np.abs(wav).max()).astype(np.float32)
    return {"wav": wav, "lengths": np.full(num_rows, wav.shape[1], np.int32), "speaker_index": index}


@jax.jit
def in_training_mode(model, fbank, lengths):
    """Embeddings [B, E] with the statistics of the batch."""
    return model(TINY, fbank, lengths, use_batch=True)[0]


loss = jax.jit(speaker.loss, static_argnums=1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_stages_and_embedding_of_a_padded_batch_equal_an_independent_forward(kind):
    golden, cfg = np.load(GOLDEN), CONFIGS[kind]
    model = fill(init(cfg, jax.random.key(0)), 7)
    fbank, lengths = golden["fbank"].astype(np.float32), jnp.asarray(golden["lengths"])
    embedding = embed(model, cfg, fbank, lengths)
    scale = np.abs(golden[f"{kind}_embedding"]).max()
    np.testing.assert_allclose(embedding, golden[f"{kind}_embedding"], atol=1e-4 * scale)

    @jax.jit
    def stages(model, fbank):
        mask = jnp.ones(fbank.shape[:2], bool)
        x = jnp.swapaxes(fbank, 1, 2)[..., None]
        x = jax.nn.relu(model.bn1(model.conv1(x, cfg.dtype)))
        images = []
        for i in range(1, 5):
            x, mask, _ = getattr(model, f"layer{i}")(cfg, x, mask, False)
            images.append(x[0, ::5])
        return images

    for i, image in enumerate(stages(model, fbank[1:, :33]), 1):
        expected = golden[f"{kind}_layer{i}"]
        np.testing.assert_allclose(image, expected, atol=1e-4 * np.abs(expected).max(), err_msg=f"layer{i}")


def test_presets_have_their_stated_sizes():
    stated = [(speaker.resnet34(), 6.63e6), (speaker.resnet221(), 23.79e6), (speaker.resnet293(), 28.62e6)]
    for cfg, size in [*stated, (speaker.mini(), 0.457e6)]:
        tree = jax.eval_shape(lambda key, cfg=cfg: speaker.init(cfg, key), jax.random.key(0))
        assert sum(x.size for x in leaves(tree)) == pytest.approx(size, rel=1.5e-3)
    assert tree.seg_1.kernel.shape == (1280, 96)


def test_padding_and_neighbours_do_not_change_an_embedding():
    cfg = CONFIGS["basic"]
    model = fill(init(cfg, jax.random.key(0)), 1)
    fbank = np.random.default_rng(0).standard_normal((2, 50, 80)).astype(np.float32)
    lengths = np.asarray([31, 50], np.int32)
    together = embed(model, cfg, fbank, jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        alone = embed(model, cfg, fbank[row : row + 1, :length], jnp.asarray([length]))
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_calibration_makes_inference_equal_training_on_the_same_batch():
    model, batch = init(TINY, jax.random.key(2)), voices(4)
    batch["lengths"][1:] = [5000, 7001, 9600]
    calibrated = speaker.calibrate(model, TINY, [batch, batch])
    fbank, lengths = (
        speaker.audio.fbank(batch["wav"], batch["lengths"]),
        speaker.audio.fbank_frames(batch["lengths"]),
    )
    in_training = in_training_mode(model, fbank, lengths)
    before = embed(model, TINY, fbank, lengths)
    after = embed(calibrated, TINY, fbank, lengths)
    scale = np.abs(in_training).max()
    np.testing.assert_allclose(after, in_training, atol=1e-3 * scale)  # E[x^2] - E[x]^2 in float32
    assert np.abs(before - in_training).max() > 0.05 * scale
    assert all(np.array_equal(a, b) for a, b in zip(leaves(model), leaves(calibrated), strict=True))
    with pytest.raises(ValueError, match="0 batches"):
        speaker.calibrate(model, TINY, [])


def test_statistics_of_batch_norm_receive_no_gradient():
    model = init(TINY, jax.random.key(3))
    gradient = jax.jit(jax.grad(lambda m: speaker.loss(m, TINY, voices(3), None)[0]))(model)
    assert not any(np.any(x) for x in leaves(gradient, trained=False))
    assert all(np.any(x) for x in leaves(gradient))


def test_loss_is_the_softmax_of_angles_with_a_margin():
    model, batch = init(TINY, jax.random.key(4)), voices(3)
    total, count, aux = loss(model, TINY, batch, None)
    fbank, lengths = (
        speaker.audio.fbank(batch["wav"], batch["lengths"]),
        speaker.audio.fbank_frames(batch["lengths"]),
    )
    x, head = (
        np.asarray(in_training_mode(model, fbank, lengths), np.float64),
        np.asarray(model.head[...]),
    )
    cos = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (
        head / np.linalg.norm(head, axis=1, keepdims=True)
    ).T
    by_hand = 0.0
    for row, right in enumerate(batch["speaker_index"]):
        logits = 32 * cos[row]
        angle = np.arccos(cos[row, right])
        assert angle < np.pi - 0.2  # else the other branch would be due
        logits[right] = 32 * np.cos(angle + 0.2)
        by_hand += np.log(np.sum(np.exp(logits))) - logits[right]
    np.testing.assert_allclose(total, by_hand, rtol=1e-4)
    assert count == 3 and aux["accuracy"][0] == np.sum(cos.argmax(1) == batch["speaker_index"])


def test_wrong_inputs_are_refused_with_the_number_that_is_wrong():
    model = init(TINY, jax.random.key(0))
    with pytest.raises(ValueError, match="128"):
        speaker.embed(model, TINY, jnp.zeros((1, 20, 128)), jnp.asarray([20]))
    bare, bare_cfg = speaker.without_head(model, TINY)
    assert bare.head is None
    like = jax.eval_shape(lambda key: speaker.init(bare_cfg, key), jax.random.key(0))
    assert jax.tree.structure(bare) == jax.tree.structure(like)
    with pytest.raises(ValueError, match="num_speakers"):
        speaker.loss(bare, bare_cfg, voices(1), None)
    with pytest.raises(ValueError, match="four"):
        speaker.Config(repeats=(3, 4, 6))
    assert speaker.Config(repeats=[1, 1, 1, 1]).repeats == (1, 1, 1, 1)


def test_three_voices_are_told_apart_after_training_also_in_new_clips():
    model, tx = init(TINY, jax.random.key(6)), optax.adam(3e-3)
    batch = voices(6, 0.5)

    @jax.jit
    def step(model, opt_state):
        def objective(model):
            total, count, aux = speaker.loss(model, TINY, batch, None)
            return total / count, aux

        (_, aux), gradient = jax.value_and_grad(objective, has_aux=True)(model)
        updates, opt_state = tx.update(gradient, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, aux

    opt_state = tx.init(model)
    for _ in range(40):
        model, opt_state, aux = step(model, opt_state)
    assert aux["accuracy"][0] == aux["accuracy"][1] == 6
    model = speaker.calibrate(model, TINY, [batch])
    new = voices(6, 0.7, seed=1)
    fbank = speaker.audio.fbank(new["wav"], new["lengths"])
    x = np.asarray(embed(model, TINY, fbank, speaker.audio.fbank_frames(new["lengths"])))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cos = x @ x.T
    same = (new["speaker_index"][:, None] == new["speaker_index"]) & ~np.eye(6, dtype=bool)
    assert cos[same].min() > cos[new["speaker_index"][:, None] != new["speaker_index"]].max()


def test_a_row_of_an_unknown_speaker_carries_no_loss_and_is_not_counted():
    model, batch = init(TINY, jax.random.key(4)), voices(4)

    def sums(*index):
        total, count, aux = loss(model, TINY, batch | {"speaker_index": np.array(index, np.int32)}, None)
        return np.array([total, count, *aux["accuracy"]])

    found = sums(0, 1, 2, -1)
    np.testing.assert_allclose(found, sums(0, 1, 2, 0) - sums(-1, -1, -1, 0), rtol=1e-4)
    assert found[1] == found[3] == 3
