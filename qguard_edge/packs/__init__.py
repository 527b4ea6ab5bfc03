"""Baseline packs: what the reference said, written down once, so that a candidate can be checked without the reference.

    pack     the file: its fields, strict reading and writing
    matchers matchers as the plain values of a suite file, so that a pack carries its own suites
    record   `qguard-edge baseline`: ask the reference and write everything down
    topk     KL divergence when only the likeliest tokens of the reference are known
    server   a running llama-server or another OpenAI-compatible completion endpoint
    check    `qguard-edge check`: ask the candidate, a file or a server, and compare with the pack

Nothing here imports torch or transformers.
"""
