"""The S3 tokenizer V2 at full size, inside a recogniser of text: records with `text` are enough.

What: 123.7 M parameters of the encoder, 25 tokens a second, 6,561 codes (FSQ, eight digits of three values), and behind
  the codes six more blocks of its size and CTC (119.1 M, not exported); 210,000 steps of 64 utterances of up to 30 s,
  Adam, Noam with 10,000 warm-up steps and peak 1e-4. Sizes, FSQ and its place in an ASR model are those of CosyVoice 2
  (Du et al., 2024), section 2.2; there the rest of SenseVoice-Large reads BPE symbols, here CTC reads the phones of
  `text.MiniTokenizer`, and blocks, batch, steps and rate are our choice.
Labels: phones need no download, say what is heard, and leave CTC room, which gives each symbol a token of its own: the
  English ordinary voices of the built-in pool have 0.46 phones a token (0.57 at most) and 0.71 bytes (0.87 at most).
  English and Mandarin only. Other languages and utterances above 30 s are left out, and a line says how many; a text
  that cannot be read or has more phones than its recording has tokens gives no loss, which `rows_used` counts.
  A corpus with frame labels trains on crops, as the built-in tokenizer does: --set=data.labels=frames
  --set=model.labels=frames --set=data.num_samples=160000.
Command: python -m deepasmr_jax.train --config=configs/speech_tokenizer.py --workdir=RUN --set=data.data_dirs=CORPUS
Start: --set=init_from=MODEL with converted public weights (`deepasmr convert`) keeps the meaning of their codes only as
  long as the learning rate is small; the head starts at random.
Hardware and hours: written for 8 accelerators, starts on any number (mesh.slice=-1); hours unmeasured.
Number to see: unmeasured. `code_nats` is the loss of a phone read from codes.
"""

import dataclasses

from deepasmr_jax import input_pipeline, speech_tokenizer
from deepasmr_jax.train import Mesh, Optim, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        component="speech_tokenizer",
        model=dataclasses.replace(
            speech_tokenizer.s3_v2(),
            has_head=True,
            labels="text",
            head_blocks=6,
            dtype="bfloat16",
            remat=True,
        ),
        data=input_pipeline.Config(
            stage="speech_tokenizer", batch_size=64, num_samples=480_000, labels="text", worker_count=8
        ),
        optim=Optim(name="adam", lr=1e-4, schedule="noam", warmup_steps=10_000, clip_norm=5.0),
        steps=210_000,
        ema_decay=0.9999,
        mesh=Mesh(slice=-1, data=8),
        save_every=2000,
        keep_every=50_000,
        eval_every=2000,
        eval_batches=8,
        tensorboard=True,
        export_dtype="bfloat16",
    )
