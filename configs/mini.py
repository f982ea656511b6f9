"""The built-in model: every stage of it, sized for two CPU cores. All training data is synthetic speech.

What: 16 kHz, 25 tokens/s, 18.8 M parameters as exported (language model 8.2, flow 6.5, speech tokenizer 2.0,
vocoder 1.6, speaker encoder 0.5), trained on the corpus of data/synthetic.py.
Command, stage by stage (features between the second and the third line: data/add_features.py with the
exported model):
  python -m deepasmr_jax.train --config=configs/mini.py:speech_tokenizer --workdir=RUN/speech_tokenizer \
      --export=MODEL --set=data.data_dirs=CORPUS
  python -m deepasmr_jax.train --config=configs/mini.py:speaker --workdir=RUN/speaker --export=MODEL \
      --set=data.data_dirs=CORPUS
  python -m deepasmr_jax.train --config=configs/mini.py:lm_normal --workdir=RUN/lm_normal \
      --set=data.data_dirs=FEATURES
  python -m deepasmr_jax.train --config=configs/mini.py:lm --workdir=RUN/lm --export=MODEL \
      --set=data.data_dirs=FEATURES --set=init_from=RUN/lm_normal/export
  the same with flow_normal and flow, then vocoder; recognizer is the Mandarin judge of the evaluation.
launch/mini.sh runs all of it. On recordings of your own add --set=data_note="what they are": without it the exported
model says that it was trained on synthetic speech only.
Hardware and hours: two CPU cores. docs/speed.md has the seconds a step of each stage (table "Training"); by them the
steps below take 6 hours, without corpus, features, evaluation, pool and tables. Hours of the whole: unmeasured.
Numbers to see: docs/training.md has the held-out numbers of the runs behind the shipped weights.
"""

import dataclasses

from deepasmr_jax import flow, input_pipeline, lm, recognizer, speaker, speech_tokenizer, text, vocoder_istft
from deepasmr_jax.train import Optim, TrainConfig

NOTE = "synthetic speech only (data/synthetic.py): synthesised voices and a computed whisper, no recordings"
NORMAL = dict(styles=("normal",), style_weights=(1.0,))
STAGES = (
    "speech_tokenizer", "speaker", "lm_normal", "lm", "flow_normal", "flow", "vocoder", "recognizer",
)  # fmt: skip


def get_config(stage: str = "") -> TrainConfig:
    """The run of one stage.

    Raises:
        ValueError: on an unknown stage.
    """
    common = dict(
        ema_decay=0.999, save_every=200, save_minutes=10.0, eval_every=200, export_dtype="float16", data_note=NOTE
    )  # fmt: skip
    if stage == "speech_tokenizer":
        return TrainConfig(
            component="speech_tokenizer",
            model=dataclasses.replace(
                speech_tokenizer.mini(), phone_weight=1.5, direct_weight=0.7, raw_share=0.3
            ),
            data=input_pipeline.Config(stage="speech_tokenizer", batch_size=16, num_samples=48000),
            optim=Optim(lr=1e-3, warmup_steps=100),
            steps=3000,
            **common,
        )
    if stage == "speaker":
        return TrainConfig(
            component="speaker",
            model=speaker.mini(num_speakers=60),  # train speakers of data/synthetic.py
            data=input_pipeline.Config(stage="speaker", batch_size=16, num_samples=16000),
            optim=Optim(lr=1e-3, warmup_steps=100),
            steps=2000,
            **common,
        )
    if stage in ("lm_normal", "lm"):
        styles = NORMAL if stage == "lm_normal" else {}
        return TrainConfig(
            component="lm",
            model=lm.mini(
                text.MiniTokenizer().vocab_size,
                dtype="bfloat16",  # 1.7 x faster to train on CPU
                alignment_weight=0.3,
            ),
            data=input_pipeline.Config(
                stage="lm",
                batch_size=4,
                num_tokens=512,
                max_utterances=2,
                spell_probability=0.03,
                align=True,
                **styles,
            ),
            optim=Optim(lr=1e-3, warmup_steps=200, betas=(0.9, 0.98)),
            steps=6000 if stage == "lm_normal" else 8000,
            **common,
        )
    if stage in ("flow_normal", "flow"):
        styles = NORMAL if stage == "flow_normal" else {}
        return TrainConfig(
            component="flow",
            model=flow.mini(),
            data=input_pipeline.Config(
                stage="flow", batch_size=8, num_tokens=160, no_prompt_prob=0.1, **styles
            ),
            optim=Optim(lr=1e-3, warmup_steps=200),
            steps=4000 if stage == "flow_normal" else 10000,
            **common,
        )
    if stage == "vocoder":
        return TrainConfig(
            component="vocoder",
            model=dataclasses.replace(vocoder_istft.mini(), mel_weight=5.0, stft_weight=10.0),
            data=input_pipeline.Config(stage="vocoder", batch_size=16, num_samples=16000),
            optim=Optim(lr=1e-3, warmup_steps=200, betas=(0.8, 0.99), clip_norm=10.0),
            steps=15000,
            **common,
        )
    if stage == "recognizer":
        return TrainConfig(
            component="recognizer",
            model=recognizer.mini(),
            data=input_pipeline.Config(
                stage="speech_tokenizer", batch_size=16, num_samples=96000, languages=("zh",), seed=77
            ),
            optim=Optim(lr=1e-3, warmup_steps=200),
            steps=4000,
            seed=77,
            **common,
        )
    raise ValueError(
        f"stage {stage!r} is unknown; write configs/mini.py:STAGE with one of {', '.join(STAGES)}"
    )
