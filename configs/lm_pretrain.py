"""Stage one of the language model at full size: text to speech tokens, ordinary speech.

What: 0.5 B parameters (Qwen2.5 backbone), 250,000 steps of 128 rows x 2048 positions, Adam, Noam with 10,000
  warm-up steps and peak 1e-4 (DeepASMR, training set-up: 23,000 frames a GPU, 8 GPUs, accumulation 2).
  Those 368,000 frames, if they are mel frames (50/s, as for the flow), are 184,000 speech tokens and, with text at the
  9/11 of lm_asmr.py, 225,000 positions or 110 rows: the 128 here are 17 % more, our choice.
Command: python -m deepasmr_jax.train --config=configs/lm_pretrain.py --workdir=RUN
  --set=data.data_dirs=FEATURES, where FEATURES was made with `data/add_features.py --text-tokenizer FOLDER`,
  FOLDER being CosyVoice2-0.5B's tokenizer folder CosyVoice-BlankEN (151,936 text ids; the default tokenizer of
  that script has 313 and is refused).
Start: the paper's 200,000 h are not public. CosyVoice2's weights can stand in for most of this stage: make MODEL with
  `deepasmr convert file llm.pt --out MODEL`, then add --set=init_from=MODEL.
Hardware and hours: written for 8 accelerators, starts on any number (mesh.slice=-1); hours unmeasured.
Number to see: unmeasured.
"""

from deepasmr_jax import input_pipeline, lm
from deepasmr_jax.train import Mesh, Optim, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        component="lm",
        model=lm.cosyvoice2(activation_dtype="bfloat16"),
        data=input_pipeline.Config(
            stage="lm",
            batch_size=128,
            num_tokens=2048,
            styles=("normal",),
            style_weights=(1.0,),
            worker_count=8,
        ),
        optim=Optim(name="adam", lr=1e-4, schedule="noam", warmup_steps=10_000, clip_norm=5.0),
        steps=250_000,
        accumulation=2,
        mesh=Mesh(slice=-1, data=8),
        save_every=2000,
        keep_every=50_000,
        eval_every=2000,
        eval_batches=8,
        tensorboard=True,
        export_dtype="bfloat16",
    )
