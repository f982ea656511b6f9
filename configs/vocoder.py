"""HiFi-GAN V1 at full size, with both kinds of discriminators.

What: 13.9 M parameters of the generator, mel profile hifigan (22.05 kHz, hop 256), 2,500,000 steps of 16
  crops of 8192 samples, AdamW 2e-4, betas (0.8, 0.99) (HiFi-GAN, Kong et al., 2020; there the rate falls by
  0.999 an epoch, which over as many steps is the same exponential down to 0.047 of it on LJSpeech).
Command: python -m deepasmr_jax.train --config=configs/vocoder.py --workdir=RUN --set=data.data_dirs=CORPUS
  where CORPUS was built with `data/build.py build ... --record-rate 22050` or more: of records at 16 kHz, the
  default there, nothing above 8 kHz is learned. The mel ends at 8 kHz; what is above, the generator makes of that.
Differences from the paper: no weight norm in training, and no spectral norm on the first of the scale discriminators.
Going on from public weights: --set=init_from=MODEL, with MODEL from `deepasmr convert file g_XXXXXXXX --out MODEL` and
  the same of do_XXXXXXXX, the discriminators; without the latter they start at random.
Hardware and hours: written for 1 accelerator, starts on any number (mesh.slice=-1; its 16 rows keep at most 16 busy);
  hours unmeasured; not viable on a CPU (about 1,000 samples/s on two cores).
Number to see: unmeasured.
"""

from deepasmr_jax import input_pipeline, vocoder
from deepasmr_jax.train import Mesh, Optim, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        component="vocoder",
        model=vocoder.v1(),
        data=input_pipeline.Config(
            stage="vocoder", batch_size=16, num_samples=8192, mel_profile="hifigan", worker_count=8
        ),
        optim=Optim(
            name="adamw",
            lr=2e-4,
            schedule="exponential",
            final_lr_ratio=0.047,
            warmup_steps=1,
            betas=(0.8, 0.99),
            weight_decay=0.01,
            clip_norm=None,
        ),
        steps=2_500_000,
        mesh=Mesh(slice=-1),
        save_every=5000,
        keep_every=100_000,
        eval_every=5000,
        eval_batches=8,
        tensorboard=True,
    )
