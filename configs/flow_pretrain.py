"""Stage one of the flow decoder at full size: speech tokens and a prompt to mel, ordinary speech.

What: 24 layers of width 1024, 337 M parameters, mel profile cv2 (24 kHz, 50 frames/s), 250,000 steps, Adam,
  Noam with 10,000 warm-up steps and peak 1e-5 (DeepASMR, training set-up). 23,000 frames a GPU, 8 GPUs and
  accumulation 2 are 240 rows of 767 tokens (1534 frames).
Command: python -m deepasmr_jax.train --config=configs/flow_pretrain.py --workdir=RUN
  --set=data.data_dirs=FEATURES where FEATURES was made with `data/add_features.py --mel-profile cv2`.
  Records at 16 kHz, the default of data/build.py, lower that mel towards its end at 8 kHz; the mel f5 goes to 12 kHz.
  `data/build.py build ... --record-rate 24000` keeps both (data/README.md).
Hardware and hours: written for 8 accelerators, starts on any number (mesh.slice=-1); hours unmeasured.
Number to see: unmeasured.
"""

from deepasmr_jax import flow, input_pipeline
from deepasmr_jax.train import Mesh, Optim, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        component="flow",
        # attention too: a TPU's kernel rounds its operands anyway, a GPU would multiply in float32
        model=flow.deepasmr(activation_dtype="bfloat16", attention_dtype="bfloat16", remat="full"),
        data=input_pipeline.Config(
            stage="flow",
            batch_size=240,
            num_tokens=767,  # with the time 1535 positions, three blocks of attention; one more would be padded to 1792
            mel_profile="cv2",
            styles=("normal",),
            style_weights=(1.0,),
            max_prompt_tokens=250,
            worker_count=8,
        ),
        optim=Optim(name="adam", lr=1e-5, schedule="noam", warmup_steps=10_000, clip_norm=5.0),
        steps=250_000,
        accumulation=2,
        ema_decay=0.9999,
        mesh=Mesh(slice=-1, data=8),
        save_every=2000,
        keep_every=50_000,
        eval_every=2000,
        eval_batches=8,
        tensorboard=True,
        export_dtype="bfloat16",
    )
