"""The S3 tokenizer V2 at full size, with a recognition head that reads frame labels from its codes.

What: 123.7 M parameters of the encoder, 25 tokens a second, 6,561 codes (FSQ, eight digits of three values), 210,000
  steps of 64 crops of 10 s, Adam, Noam with 10,000 warm-up steps and peak 1e-4. Sizes and FSQ are those of CosyVoice 2
  (Du et al., 2024), section 2.2; there the codes learn from an ASR model's text, here from frame labels (`phones`,
  `f0_class`), and batch, steps and rate are our choice.
Command: python -m deepasmr_jax.train --config=configs/speech_tokenizer.py --workdir=RUN --set=data.data_dirs=CORPUS
Start: --set=init_from=MODEL with converted public weights (`deepasmr convert`) keeps the meaning of their codes only as
  long as the learning rate is small; the head starts at random.
Hardware and hours: 8 accelerators (mesh.data=8); hours unmeasured.
Number to see: unmeasured; the built-in tokenizer reads 85 % of the phones from one code (docs/training.md).
"""

import dataclasses

from deepasmr_jax import input_pipeline, speech_tokenizer
from deepasmr_jax.train import Mesh, Optim, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        component="speech_tokenizer",
        model=dataclasses.replace(speech_tokenizer.s3_v2(), has_head=True, dtype="bfloat16", remat=True),
        data=input_pipeline.Config(
            stage="speech_tokenizer", batch_size=64, num_samples=160_000, worker_count=8
        ),
        optim=Optim(name="adam", lr=1e-4, schedule="noam", warmup_steps=10_000, clip_norm=5.0),
        steps=210_000,
        ema_decay=0.9999,
        mesh=Mesh(data=8),
        save_every=2000,
        keep_every=50_000,
        eval_every=2000,
        eval_batches=8,
        export_dtype="bfloat16",
    )
