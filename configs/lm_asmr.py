"""Stage two of the language model at full size: ordinary and ASMR speech, one to one.

What: 10 epochs over 1,000 h, Adam at a constant 1e-5 (DeepASMR, training set-up). 1,000 h are 90 M speech
  tokens, about 110 M positions with text, 420 steps an epoch of 128 rows x 2048 positions: 4,200 steps.
Command: python -m deepasmr_jax.train --config=configs/lm_asmr.py --workdir=RUN --set=data.data_dirs=FEATURES
  --set=init_from=RUN_OF_STAGE_ONE/export, where FEATURES was made with `data/add_features.py --text-tokenizer
  FOLDER` as for stage one.
Hardware and hours: written for 8 accelerators, starts on any number (mesh.slice=-1); hours unmeasured.
Number to see: unmeasured.
"""

import dataclasses
from pathlib import Path

from deepasmr_jax import config
from deepasmr_jax.train import Optim, TrainConfig


def get_config() -> TrainConfig:
    cfg = config.load(str(Path(__file__).with_name("lm_pretrain.py")))
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, styles=("normal", "asmr"), style_weights=(1.0, 1.0)),
        optim=Optim(name="adam", lr=1e-5, schedule="constant", warmup_steps=1, clip_norm=5.0),
        steps=4_200,
        save_every=400,
        keep_every=0,
        eval_every=400,
    )
