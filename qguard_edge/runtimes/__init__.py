"""Running a model: llama.cpp, transformers, bitsandbytes, and the devices they compute on."""
