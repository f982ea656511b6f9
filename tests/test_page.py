"""Spectrogram pictures and the demo page."""

import re
import struct
import zlib

import numpy as np
import tiny_model

from deepasmr_jax import page


def read_png(data: bytes) -> np.ndarray:
    """[rows, columns] palette indices of an 8-bit palette PNG without line filters; checks every checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        (checksum,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert checksum == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    cols, rows, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour, len(chunks[b"PLTE"])) == (8, 3, 768)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, cols + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_a_tone_is_brightest_at_its_own_frequency():
    tone = np.sin(2 * np.pi * 2000 * np.arange(16000) / 16000).astype(np.float32)
    image = page.spectrogram(tone, 16000)
    rows = image.shape[0]
    assert abs(np.argmax(image[:, 60]) - rows * 2000 / 5000) <= 1
    assert image.min() >= 0 and image.max() <= 1 and image[rows // 2 :, 60].max() < 0.3


def test_harmonics_show_as_lines_and_noise_does_not():
    def ripple(wav):  # how much brighter the lines are than what lies between them, 200 to 1500 Hz
        image = page.spectrogram(wav, 16000)[13:96, 20:200]
        return np.mean(np.abs(np.diff(image.mean(axis=1))))

    assert ripple(tiny_model.buzz(f0_hz=200.0)) > 3 * ripple(tiny_model.hiss())


def test_the_picture_is_a_png_whose_size_follows_the_duration():
    short, long = (read_png(page.picture(tiny_model.hiss(s), 16000)) for s in (1.0, 2.0))
    assert short.shape[0] == long.shape[0] and long.shape[1] - short.shape[1] == 125


def test_silence_and_a_single_sample_still_give_a_picture():
    for wav in (np.zeros(16000, np.float32), np.ones(1, np.float32)):
        assert read_png(page.picture(wav, 16000)).shape[0] > 200


def test_the_page_needs_nothing_outside_itself_and_escapes_what_it_is_given():
    row = page.Row("N2A", "made", '<b>rain & "wind"</b>', tiny_model.hiss(0.5), 16000, {"unvoiced %": "93"})
    text = page.demo(
        "Title",
        "A small demonstration.",
        [page.Section("A voice", "Intro.", [], [row])],
        "Settings.",
        "A <road>.",
    )
    links = re.findall(r"(?:src|href)=\"([^\"]*)", text)
    assert (
        links.pop(0) == "#road" and '<section id="road"><h2>The road to full size</h2><p>A &lt;road' in text
    )
    assert len(links) == 2 and all(link.startswith("data:") for link in links)
    assert "A small demonstration." in text and "<td>93</td>" in text
    assert "&lt;b&gt;rain &amp; " in text and "<b>rain" not in text


def test_a_note_stands_below_the_caption_and_in_the_last_column_of_the_table():
    wav = tiny_model.hiss(0.5)
    plain = page.Row("N2N", "made", "one", wav, 16000, {"seconds": "0.5"})
    noted = page.Row("N2A", "made", "two", wav, 16000, {"seconds": "0.6"}, ("cut <short>",))
    text = page.demo("T", "N.", [page.Section("V", "", [], [plain, noted])], "S.")
    note = '<div class="note">Note: cut &lt;short&gt;</div>'
    assert f'<span class="caption">made</span></div>{note}<div class="text">two' in text
    assert "<th>seconds</th><th>Note</th>" in text
    assert '<td>0.5</td><td class="note"></td>' in text
    assert '<td>0.6</td><td class="note">cut &lt;short&gt;</td>' in text
    without = page.demo("T", "N.", [page.Section("V", "", [], [plain])], "S.")
    assert "<th>Note" not in without and 'class="note"' not in without and "#road" not in without


def test_the_wav_in_the_page_holds_the_samples():
    import io
    import wave

    wav = tiny_model.buzz(0.3)
    with wave.open(io.BytesIO(page.wav_bytes(wav, 16000))) as f:
        read = np.frombuffer(f.readframes(f.getnframes()), "<i2") / 32767
        assert f.getframerate() == 16000 and f.getnchannels() == 1
    np.testing.assert_allclose(read, wav, atol=1 / 32767)
