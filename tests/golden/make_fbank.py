"""Makes fbank.npz: Kaldi filter banks of a synthetic clip by the kaldi-native-fbank library.

Run from the repository root: python tests/golden/make_fbank.py
"""

from pathlib import Path

import kaldi_native_fbank as knf
import numpy as np


def clip() -> np.ndarray:
    """0.35 s of a chirp with noise and a quiet second half, float32 at 16 kHz."""
    rng = np.random.default_rng(5)
    t = np.arange(5600) / 16000
    wav = 0.4 * np.sin(2 * np.pi * (200 * t + 4000 * t**2)) + 0.02 * rng.standard_normal(t.size)
    return (wav * np.where(t < 0.2, 1.0, 0.01)).astype(np.float32)


def reference(wav: np.ndarray, window: str, scale: float) -> np.ndarray:
    """[T, 80] log filter bank, mean over time removed."""
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = window
    options.frame_opts.samp_freq = 16000
    options.mel_opts.num_bins = 80
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(16000, (wav * scale).tolist())
    fbank.input_finished()
    frames = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
    return frames - frames.mean(axis=0)


if __name__ == "__main__":
    wav = clip()
    np.savez_compressed(
        Path(__file__).with_name("fbank.npz"),
        wav=wav,
        hamming=reference(wav, "hamming", 32768.0),
        povey=reference(wav, "povey", 1.0),
    )
