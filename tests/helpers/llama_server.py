"""llama.cpp's own server on a file, as the package xllamacpp carries it: python llama_server.py MODEL PORT."""

import sys
import threading

import xllamacpp


def main(model: str, port: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.ui = False
    params.no_extra_bufts = True  # as in openai_server.py
    server = xllamacpp.Server(params)  # listens as long as it lives
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main(*sys.argv[1:])
