"""Every model at toy size, for tests and smoke runs; nothing it makes can be listened to.

What: one stage of `STAGES`, a few steps.
Command: python -m deepasmr_jax.train --config=configs/tiny.py:lm --workdir=RUN --set=data.data_dirs=FEATURES
Hardware and hours: any CPU, under a minute.
Number to see: none; the loss falls.
"""

from deepasmr_jax import flow, input_pipeline, lm, speaker, speech_tokenizer, text, vocoder_istft
from deepasmr_jax.train import Optim, TrainConfig

STAGES = (
    "lm", "flow", "vocoder", "vocoder_adversarial", "speech_tokenizer", "speech_tokenizer_text", "speaker",
)  # fmt: skip


def get_config(stage: str = "lm") -> TrainConfig:
    """The run of one stage.

    Raises:
        ValueError: on an unknown stage.
    """
    if stage not in STAGES:
        raise ValueError(
            f"stage {stage!r} is unknown; write configs/tiny.py:STAGE with one of {', '.join(STAGES)}"
        )
    component = stage.removesuffix("_adversarial").removesuffix("_text")
    sizes = dict(
        num_tokens=128 if stage == "lm" else 64,
        num_samples=4160 if component == "vocoder" else 16000,
        min_prompt_tokens=10,
        max_prompt_tokens=20,
        num_threads=1,
    )
    if stage == "lm":
        vocab = text.MiniTokenizer().vocab_size
        model = lm.mini(vocab, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64)
    elif stage == "flow":
        model = flow.mini(width=32, num_layers=2, num_heads=2, head_dim=16, token_width=16, conv_groups=4)
    elif stage == "vocoder":
        model = vocoder_istft.Config(width=16, mlp_width=32, num_layers=2)
    elif stage == "vocoder_adversarial":
        model = vocoder_istft.Config(
            width=16, mlp_width=32, num_layers=2, adversarial=True, periods=(2, 3), period_channels=(4, 8),
            spectrogram_sizes=(256,), spectrogram_channels=(4, 8),
        )  # fmt: skip
    elif component == "speech_tokenizer":
        sizes["labels"] = "text" if stage.endswith("_text") else "frames"
        model = speech_tokenizer.Config(
            width=32, num_heads=2, num_blocks=1, mlp_width=64, has_head=True, labels=sizes["labels"],
            head_blocks=1, head_width=32, fsmn_kernel=5 if stage.endswith("_text") else 31,
        )  # fmt: skip
    else:
        model = speaker.Config(base_channels=2, repeats=(1, 1, 1, 1), embedding_size=8, num_speakers=3)
    return TrainConfig(
        component=component,
        model=model,
        data=input_pipeline.Config(stage=component, batch_size=8, **sizes),
        optim=Optim(lr=1e-3, warmup_steps=2),
        steps=4,
        ema_decay=0.9,
        log_every=1,
        save_every=2,
        eval_every=4,
        eval_batches=1,
        data_note="whatever data_dirs holds; a toy model",
    )
