"""Pictures and pages: a spectrogram as a PNG file, and the demo's self-contained HTML page.

NumPy and the standard library only, so that a picture never needs an extra package. The page works without a
network: sounds and pictures are inside it as base64.

What to see in a picture: normal speech shows evenly spaced horizontal lines (the harmonics of the voice) in
the lower half during vowels; whispered speech shows the same formant bands, but filled with noise and no
lines.
"""

import base64
import html
import io
import struct
import wave
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# anchors of a dark-to-light map of rising lightness, so that a grey print still reads; from black-violet to
# cream
_COLOURS = np.array(
    [
        (6, 5, 24), (31, 17, 74), (71, 24, 113), (113, 31, 124), (156, 44, 120),
        (198, 61, 105), (233, 90, 85), (249, 137, 87), (253, 188, 121), (252, 240, 190),
    ],
    np.float64,
)  # fmt: skip
_INK, _PAPER = 254, 255  # palette entries of axis text and background
_LEVELS = 250
# 3 x 5 dot letters for the axes: five rows from the top, three bits each
_FONT = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1), "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 1, 1, 1),
    "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7), "k": (4, 5, 6, 5, 5), "H": (5, 5, 7, 5, 5),
    "z": (0, 7, 1, 4, 7), "s": (0, 7, 4, 1, 7),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One sound of the demo page.

    Attributes:
        label: short name, such as "N2A".
        caption: one line below the label.
        text: what is said.
        wav: [W] float32 in [-1, 1].
        sample_rate: in Hz.
        cells: measure name -> printable value, in the order of the columns.
        notes: sentences on what was changed or guessed, below the caption and in the last column.
    """

    label: str
    caption: str
    text: str
    wav: np.ndarray
    sample_rate: int
    cells: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page: a voice, with its own clips first and what was made from them after."""

    title: str
    intro: str
    clips: Sequence[Row]
    outputs: Sequence[Row]


def spectrogram(wav: np.ndarray, sample_rate: int, *, range_db: float = 65.0) -> np.ndarray:
    """Narrow-band level picture of a waveform, fine enough to show the harmonics of a voice.

    Args:
        wav: [W] float, any length from one sample.
        sample_rate: in Hz.
        range_db: levels this far below the 99.9th percentile of the picture are darkest.

    Returns:
        [F, T] float32 in 0..1, row 0 = 0 Hz, the last row below 5 kHz or half the rate; 64 ms Hann windows,
        8 ms apart; rows of 15.6 Hz, so that the harmonics of a voice of 100 Hz are six rows apart.
    """
    window, hop = round(0.064 * sample_rate), round(0.008 * sample_rate)
    x = np.pad(np.asarray(wav, np.float32), (window // 2, window // 2 + hop))
    starts = np.arange(0, len(wav), hop)
    frames = x[starts[:, None] + np.arange(window)] * np.hanning(window + 1)[:-1].astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    level = 10 * np.log10(power[:, : round(_top_hz(sample_rate) / sample_rate * window)].T + 1e-12)
    high = np.percentile(level, 99.9)
    return np.clip((level - high) / range_db + 1, 0, 1).astype(np.float32)


def picture(wav: np.ndarray, sample_rate: int) -> bytes:
    """PNG file of the spectrogram of a waveform [W], with seconds below and kHz at the left."""
    image = spectrogram(wav, sample_rate)
    rows, cols = image.shape
    left, bottom, top, right = 26, 18, 8, 12
    canvas = np.full((rows + bottom + top, max(cols, 60) + left + right), _PAPER, np.uint8)
    canvas[top : top + rows, left : left + cols] = np.round(image[::-1] * (_LEVELS - 1)).astype(np.uint8)
    top_khz = _top_hz(sample_rate) / 1000
    for khz in range(0, int(top_khz) + 1):
        y = top + rows - 1 - round(khz / top_khz * (rows - 1))
        canvas[y, left - 5 : left] = _INK
        _write(canvas, f"{khz}", left - 14, min(max(y - 5, 0), canvas.shape[0] - 10))
    _write(canvas, "kHz", 0, top + 14)
    step = 1 if cols / 125 < 12 else 5
    for second in range(0, int(cols / 125) + 1, step):
        x = left + min(second * 125, cols - 1)
        canvas[top + rows : top + rows + 4, x] = _INK
        _write(canvas, f"{second}s", max(x - 3, 0), top + rows + 6)
    return _png(canvas)


def image(levels: np.ndarray) -> bytes:
    """PNG file of a matrix [F, T] of 0..1 without axes, row 0 at the bottom; values outside are clipped."""
    return _png(np.round(np.clip(levels[::-1], 0, 1) * (_LEVELS - 1)).astype(np.uint8))


def wav_bytes(wav: np.ndarray, sample_rate: int) -> bytes:
    """A 16-bit mono WAV file, in memory, of a waveform [W] in [-1, 1]."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(sample_rate)
        f.writeframes(np.round(np.clip(wav, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def player(row: Row) -> str:
    """HTML of one sound: its player over its spectrogram."""
    sound = base64.b64encode(wav_bytes(row.wav, row.sample_rate)).decode()
    image = base64.b64encode(picture(row.wav, row.sample_rate)).decode()
    name = html.escape(f"{row.label}: {row.text}", quote=True)
    return (
        f'<audio controls preload="none" aria-label="{name}" src="data:audio/wav;base64,{sound}"></audio>'
        f'<img alt="Spectrogram of {name}" src="data:image/png;base64,{image}">'
    )


def demo(title: str, notice: str, sections: Sequence[Section], settings: str, road: str = "") -> str:
    """The demo page.

    Args:
        title: heading.
        notice: the sentence that says what the listener must know about the model.
        sections: one per voice.
        settings: how the measures of the table were taken; one paragraph.
        road: how a model of full size comes about, one paragraph at the end, to which the notice links; "": none.

    Returns:
        One HTML document that needs nothing outside itself.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="notice">{html.escape(notice)}{_ROAD_LINK * bool(road)}</p>',
        f"<p>{_READING}</p>",
    ]
    for section in sections:
        parts.append(f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.intro)}</p>")
        for heading, rows in (
            ("The clips the voice is taken from", section.clips),
            ("Made", section.outputs),
        ):
            if rows:
                cards = "".join(_card(row) for row in rows)
                parts.append(f'<h3>{heading}</h3><div class="cards">{cards}</div>')
        parts.append("</section>")
    parts.append("<section><h2>Numbers</h2>")
    parts.append(_table([(s.title, row) for s in sections for row in (*s.clips, *s.outputs)]))
    parts.append(f'<p class="small">{html.escape(settings)}</p></section>')
    if road:  # in the page itself, which may be sent without the repository
        parts.append(f'<section id="road"><h2>The road to full size</h2><p>{html.escape(road)}</p></section>')
    parts.append("</main></body></html>")
    return "\n".join(parts)


_ROAD_LINK = ' <a href="#road">The road to full size</a> is at the end of this page.'
_READING = (
    "Each task name tells the style of the clip and the style of the output: <b>N</b> is normal, <b>A</b> is "
    "whispered ASMR, so N2A turns an ordinary voice into a whisper. In the pictures, normal speech shows "
    "evenly spaced horizontal lines in its vowels: the harmonics of the voice. Whispered speech shows the same "
    "bands of energy filled with noise, and no lines."
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1b26; --soft: #625e70; --paper: #fbfaf8; --card: #fff;
  --line: #e4e0ea; --mark: #8a3a78; --note: #f6eef4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ece9f2; --soft: #a8a2b8; --paper: #15131c;
  --card: #1e1b28;  --line: #35303f; --mark: #e08bc6; --note: #2a2030; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "PingFang SC", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; }
h3 { font-size: .95rem; color: var(--soft); font-weight: 600; margin: 1.6rem 0 .6rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
.notice { border-left: 4px solid var(--mark); background: var(--note); padding: .8rem 1rem;
  border-radius: 0 6px 6px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem 1rem;
  margin: 0; min-width: 0; }
.card b { color: var(--mark); font-size: 1.05rem; margin-right: .4rem; }
.card .caption { color: var(--soft); font-size: .88rem; }
.card .note { color: var(--soft); font-size: .88rem; }
td.note { text-align: left; white-space: normal; min-width: 16rem; }
.card .text { margin: .25rem 0 .6rem; }
.card audio { width: 100%; height: 36px; display: block; margin-bottom: .6rem; }
.card img { width: 100%; display: block; border-radius: 6px; background: #fff; image-rendering: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; }
a { color: var(--mark); }
.small { color: var(--soft); font-size: .86rem; max-width: 60rem; }
"""


def _card(row: Row) -> str:
    notes = "".join(f'<div class="note">Note: {html.escape(note)}</div>' for note in row.notes)
    return (
        f'<figure class="card"><div><b>{html.escape(row.label)}</b>'
        f'<span class="caption">{html.escape(row.caption)}</span></div>{notes}'
        f'<div class="text">{html.escape(row.text)}</div>{player(row)}</figure>'
    )


def _table(rows: Sequence[tuple[str, Row]]) -> str:
    names = list(dict.fromkeys(name for _, row in rows for name in row.cells))
    noted = any(row.notes for _, row in rows)
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("Voice", "Sound", *names, *["Note"] * noted))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(c)}</td>" for c in (title, row.label, *(row.cells.get(n, "–") for n in names))
        )
        + f'<td class="note">{html.escape("; ".join(row.notes))}</td>' * noted
        + "</tr>"
        for title, row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _top_hz(sample_rate: int) -> float:
    """Highest frequency of the pictures: above 5 kHz no harmonic is seen, below it all of them are."""
    return min(5000.0, sample_rate / 2)


def _write(canvas: np.ndarray, text: str, x: int, y: int) -> None:
    for letter in text:  # dots doubled in both directions: 6 x 10 pixels a letter, 8 apart
        dots = np.array([[(row >> bit) & 1 for bit in (2, 1, 0)] for row in _FONT[letter]], bool)
        big = dots.repeat(2, axis=0).repeat(2, axis=1)
        area = canvas[y : y + 10, x : x + 6]
        area[big[: area.shape[0], : area.shape[1]]] = _INK
        x += 8


def _png(indices: np.ndarray) -> bytes:
    """An 8-bit palette PNG; the format is in the W3C Portable Network Graphics specification."""
    at = np.linspace(0, len(_COLOURS) - 1, _LEVELS)
    palette = np.zeros((256, 3), np.uint8)
    palette[:_LEVELS] = np.stack([np.interp(at, range(len(_COLOURS)), c) for c in _COLOURS.T], 1).round()
    palette[_INK], palette[_PAPER] = (70, 66, 84), (255, 255, 255)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows, cols = indices.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), indices], 1)  # filter type 0 before each line
    head = struct.pack(">IIBBBBB", cols, rows, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"PLTE", palette.tobytes())
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
        + chunk(b"IEND", b"")
    )
