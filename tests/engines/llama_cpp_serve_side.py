"""The command `llama-server` in an environment that has xllamacpp, which has the server but not the command.

usage: llama_cpp_serve_side.py -m FILE --port PORT
"""

import argparse
import signal

import xllamacpp as llama

parser = argparse.ArgumentParser()
parser.add_argument("-m")
parser.add_argument("--port", type=int)
chosen = parser.parse_args()
params = llama.CommonParams()
params.model.path, params.port = chosen.m, chosen.port
params.cpuparams.n_threads, params.warmup = 1, False
server = llama.Server(params)
signal.pause()
