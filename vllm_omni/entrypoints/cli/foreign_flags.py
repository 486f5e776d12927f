"""Flags of vLLM and of other servers that people bring along, and what this server says to each. Pure data."""

from __future__ import annotations

# Sizes of parallelism: 1 is taken, anything else is refused. By the field, the other names of its flag.
PARALLEL: dict[str, tuple[str, ...]] = {
    "pipeline_parallel_size": ("-pp",),
    "allgather_degree": (),
    "vae_patch_parallel_size": (),
    "text_encoder_tp_size": (),
    "num_gpus": (),
    "api_server_count": (),
}
_SPLIT = "--tensor-parallel-size, --cfg-parallel-size, --ulysses-degree and --ring-degree split a model here"
ONE_DEVICE = f"must be 1: {_SPLIT}, and --data-parallel-size makes several engines"

_SEVERAL = f"is not how several devices are used: {_SPLIT}"
_FROM_PIPE = "is not done by the server; set the pipeline up in Python and pass it to Omni.from_pipe"
_TEXT = "is about language models; see --help for what limits pictures"
_STAGES = "is about pipelines of several models; one diffusion model is served"
_HUB = "is not a flag; the hub's client reads"
REFUSED: dict[str, str] = {
    "--use-hsdp": _SEVERAL,
    "--enable-expert-parallel": _SEVERAL,
    "--distributed-executor-backend": _SEVERAL,
    "--nnodes": _SEVERAL,
    "--headless": _SEVERAL,
    "--diffusion-offload-config": _FROM_PIPE,
    "--cpu-offload-gb": "is not done by size; --enable-cpu-offload keeps idle parts of the model in main memory",
    "--enable-sleep-mode": "is not needed: POST /sleep and /wake_up are always there",
    "--enable-lora": "is not needed: --lora-modules NAME=PATH names adapters; --allowed-model-folders lets more come",
    "--lora-path": "is --lora-modules NAME=PATH here, and requests choose by name",
    "--lora-scale": "belongs to a request: its field `lora` has a name and a scale",
    "--generation-config": "is not a flag: generation_config.json in the model's folder holds its defaults",
    "--step-execution": "is always on: requests share a batch at every step; leave it out",
    "--request-batch-max-wait-ms": "is not needed: a request joins the batch at the next step; leave it out",
    "--diffusion-streaming-output": "belongs to a request: its fields `stream` and `partial_images`",
    "--enable-cache-dit-summary": "is about cache-dit, which keeps one state per model; try --cache-backend fbcache",
    "--max-generated-image-size": "is --max-pixels here",
    "--diffusion-compile-granularity": "is always regional, with --no-enforce-eager",
    "--diffusion-compile-dynamic": "is always on, with --no-enforce-eager",
    "--compilation-config": "has no meaning here; --no-enforce-eager compiles the model's blocks",
    "--diffusion-load-format": "is always safetensors",
    "--load-format": "is always safetensors",
    "--trust-remote-code": "is refused: no code comes from a model's folder",
    "--model-class-name": "is not a flag: model_index.json in the model's folder names the pipeline",
    "--boundary-ratio": "belongs to the model's folder, whose model_index.json holds it, or to a request",
    "--flow-shift": "belongs to the model's folder: scheduler/scheduler_config.json holds it",
    "--seed": "belongs to a request: its field `seed`",
    "--stage-overrides": _STAGES,
    "--deploy-config": _STAGES,
    "--stage-configs-path": _STAGES,
    "--enable-diffusion-pipeline-profiler": "is --profiler-dir FOLDER here, with POST /start_profile",
    "--disable-log-stats": "is the default; --log-stats writes them to the log",
    "--enable-log-requests": "is always on; --log-prompts adds the prompts",
    "--enable-request-id-headers": "is always on: every reply has an X-Request-Id",
    "--download-dir": f"{_HUB} HF_HOME",
    "--hf-token": f"{_HUB} HF_TOKEN",
} | dict.fromkeys(
    (
        "--max-model-len", "--max-num-batched-tokens", "--block-size", "--kv-cache-dtype", "--enable-prefix-caching",
        "--enable-chunked-prefill", "--tokenizer", "--tokenizer-mode", "--chat-template", "--enable-auto-tool-choice",
        "--tool-call-parser", "--reasoning-parser", "--speculative-config", "--limit-mm-per-prompt", "--runner",
        "--convert", "--task", "--logits-processors", "--response-role", "--swap-space",
    ),
    _TEXT,
)  # fmt: skip
