"""WeSpeaker's ResNet34 at full size, by the recipe of its VoxCeleb example.

What: 6.64 M parameters of the encoder and 1.53 M of the head (5,994 speakers, VoxCeleb2's training set), 640,000 steps
  of 256 crops of 200 frames, which are 150 epochs of it: SGD with Nesterov's momentum 0.9, weight decay 1e-4, a rate
  that rises over 6 epochs and falls exponentially from 0.1 to 5e-5, additive angular margin 0.2, scale 32 (WeSpeaker,
  examples/voxceleb/v2/conf/resnet.yaml; Wang et al., 2023).
Differences: there the margin rises from 0 to 0.2 between epochs 20 and 40, here it is what model.margin says (for a
  start without it, another RUN with --set=model.margin=0 --set=steps=85000, then --set=init_from=RUN); noise,
  reverberation and changed speeds are not added here; the last weights are exported, not the mean of ten epochs.
Command: python -m deepasmr_jax.train --config=configs/speaker.py --workdir=RUN --set=data.data_dirs=CORPUS
  --set=model.num_speakers=N, N the speakers of its split train.
Hardware and hours: written for 2 accelerators, starts on any number (mesh.slice=-1); hours unmeasured.
Number to see: unmeasured; the released weights have an equal error rate of 0.87 % on Vox1-O.
"""

import dataclasses

from deepasmr_jax import input_pipeline, speaker
from deepasmr_jax.train import Mesh, Optim, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        component="speaker",
        model=dataclasses.replace(speaker.resnet34(), num_speakers=5994, margin=0.2, scale=32.0),
        data=input_pipeline.Config(
            stage="speaker",
            batch_size=256,
            num_samples=32_240,  # 200 frames
            styles=("normal",),
            style_weights=(1.0,),
            worker_count=8,
        ),
        optim=Optim(
            name="sgd",
            lr=0.1,
            schedule="exponential",
            final_lr_ratio=5e-4,
            warmup_steps=25_600,
            betas=(0.9, 0.0),
            weight_decay=1e-4,
            clip_norm=None,
        ),
        steps=640_000,
        mesh=Mesh(slice=-1, data=2),
        save_every=5000,
        keep_every=100_000,
        eval_every=5000,
        eval_batches=8,
        tensorboard=True,
    )
