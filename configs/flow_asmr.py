"""Stage two of the flow decoder at full size: ordinary and ASMR speech one to one, prompts in a random style.

What: 40 epochs over 1,000 h, Adam at a constant 1e-5 (DeepASMR, training set-up). A row of 767 tokens holds
  about 450 tokens of target, so an epoch of 90 M tokens is about 830 steps of 240 rows: 33,000 steps.
Command: python -m deepasmr_jax.train --config=configs/flow_asmr.py --workdir=RUN
  --set=data.data_dirs=FEATURES --set=init_from=RUN_OF_STAGE_ONE/export
Hardware and hours: written for 8 accelerators, starts on any number (mesh.slice=-1); hours unmeasured.
Number to see: unmeasured.
"""

import dataclasses
from pathlib import Path

from deepasmr_jax import config
from deepasmr_jax.train import Optim, TrainConfig


def get_config() -> TrainConfig:
    cfg = config.load(str(Path(__file__).with_name("flow_pretrain.py")))
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, styles=("normal", "asmr"), style_weights=(1.0, 1.0)),
        optim=Optim(name="adam", lr=1e-5, schedule="constant", warmup_steps=1, clip_norm=5.0),
        steps=33_000,
    )
