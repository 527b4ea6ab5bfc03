"""Look before converting: does a full-precision model show marks of tampering that rounding cannot, or should not, hide?

findings     what can be found: codes, severities, texts
tensors      a model's float tensors, from a GGUF or a Hugging Face folder, read slice by slice
positions    where each weight lies in its quantization cell, per type
outliers     outlier injection: chunks whose largest weight blots out the others
boxes        box fingerprints: weights piled up at the walls that a repair could not cross
sanity       not-a-number, dead tensors, precision, weights that were on a grid before
scanner      the walk over the model that feeds the three above
limits       the ranges that clean models showed, shipped as data
dose         the dose curve (`--deep`): the only one that runs the model
guard        the scan inside `convert`, before and after llama.cpp quantizes
report       JSON, SARIF and HTML

A finding is a hint, not proof: weights can lie as they lie for honest reasons, and an attacker who knows these tests can
evade them. A clean scan is no guarantee either.
"""
