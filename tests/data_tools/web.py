"""A web server on this machine that behaves, breaks off, stalls, lies or knows no ranges, as a test asks."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """``files`` by path; ``asked`` lists (path, Range header). ``cut``: bytes of an answer after which the connection ends, by number of the request."""

    def __init__(self, files):
        self.files, self.asked, self.cut, self.ranges, self.stall = dict(files), [], {}, True, 0.0

    def url(self, path):
        return f"http://127.0.0.1:{self.port}/{path}"


@contextmanager
def serve(files):
    server = Server(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            number = len(server.asked)
            wanted = self.headers.get("Range", "")
            server.asked.append((self.path[1:], wanted))
            data = server.files.get(self.path[1:])
            if data is None:
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
            if start >= len(data) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + server.cut.get(number, len(data))])
            self.wfile.flush()
            time.sleep(server.stall)
            self.close_connection = True

        def log_message(self, *words):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
