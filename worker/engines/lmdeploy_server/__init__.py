"""A remote lmdeploy `api_server`, over HTTP: `POST /generate` with token ids.

`wire` is what travels, `server` the connection, `reader` one sample's request, `probe` what a server is asked at the
start, `local` what is needed here of the model's directory (tokenizer, context, stop tokens), `engine` puts them
together. Nothing here imports lmdeploy or torch.

Its weights are the server's own: `/update_weights` un-pickles what it is sent, so it is never called.
"""

from importlib.util import find_spec

from protocols.errors import ConfigError
from worker.config import Config
from worker.engines.base import Engine

from .settings import Settings

_PACKAGES = ("httpx2", "jinja2", "tokenizers", "transformers")


def build(config: Config) -> Engine:
    """The engine that a worker's configuration asks for, not started; raises ConfigError where something is missing."""
    if config.engine_url is None:
        raise ConfigError(
            "--engine-url: the engine `lmdeploy-server` needs its server's, as http://gpu-1:23333",
            param="engine-url",
        )
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the engine `lmdeploy-server` needs {', '.join(missing)}; run "
            "`pip install 'rolloutq[lmdeploy-server]'`, or choose another engine"
        )
    # its packages are an extra's
    from .engine import LMDeployServerEngine

    return LMDeployServerEngine(
        Settings(
            url=config.engine_url,
            key=config.engine_key,
            model=config.model,
            served_name=config.served_model,
            slots=config.slots,
            context_tokens=config.context_tokens,
            policy_version=config.policy_version,
        )
    )
