"""As much of wandb's server as a run needs: python wandb_server.py ASKED says its port, and writes what it is asked."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = {"id": "x", "name": "x", "displayName": "x", "config": "{}", "historyLineCount": 0,
          "project": {"id": "p", "name": "contrastive", "entity": {"id": "e", "name": "me"}}}
ANSWER = {"data": {"upsertBucket": {"bucket": BUCKET, "inserted": True}, "model": {"bucket": None},
                   "createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []},
                   "viewer": {"id": "u", "entity": "me", "username": "me", "teams": {"edges": []}}}}


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = json.dumps(ANSWER if self.path.endswith("graphql") else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        with open(sys.argv[1], "a") as file:
            file.write(f"{self.path}\n")

    do_GET = do_PUT = do_POST

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
