"""A local server that speaks the protocol of the Fast Transcription service, for tests."""

import contextlib
import email.parser
import email.policy
import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator

import numpy as np
import soundfile

KEY = "a-test-key"


class Service:
    """What was asked, and what to answer next.

    Attributes:
        asked: one dict a request: path, headers, definition (parsed), wav, rate, names of the form's fields.
        refusals: (status, headers, body) to answer first, in order.
        answer: waveform -> the JSON of a good answer.
        url: of the server.
    """

    def __init__(self, answer: Callable[[np.ndarray], dict]):
        self.asked, self.refusals, self.answer, self.url = [], [], answer, ""


@contextlib.contextmanager
def serve(answer: Callable[[np.ndarray], dict]) -> Iterator[Service]:
    """A running service; it stops when the block ends."""
    service = Service(answer)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
            fields = {p.get_param("name", header="content-disposition"): p for p in form.iter_parts()}
            wav, rate = soundfile.read(io.BytesIO(fields["audio"].get_payload(decode=True)), dtype="float32")
            definition = json.loads(fields["definition"].get_payload(decode=True))
            service.asked.append(
                {"path": self.path, "headers": dict(self.headers), "fields": sorted(fields)}
                | {"definition": definition, "wav": wav, "rate": rate}
            )
            if self.headers["Ocp-Apim-Subscription-Key"] != KEY:
                refused = {
                    "error": {"code": "401", "message": "Access denied due to invalid subscription key."}
                }
                self._send(401, {}, refused)
            elif service.refusals:
                self._send(*service.refusals.pop(0))
            else:
                self._send(200, {}, service.answer(wav))

        def _send(self, status: int, headers: dict, body):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
