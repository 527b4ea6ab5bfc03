"""Baseline packs: the base's answers and predictions, recorded once, so that a candidate can be checked without the base.

    pack     the file: its fields, strict reading and writing
    matchers matchers as the plain values of a suite file, so that a pack carries its own suites
    record   `qguard-edge baseline`: run the base and record everything
    topk     KL divergence when only the likeliest tokens of the base are known
    server   a running llama-server or another OpenAI-compatible completion endpoint
    check    `qguard-edge check`: run the candidate, a file or a server, and compare with the pack

Nothing here imports torch or transformers.
"""
