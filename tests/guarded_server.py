"""A server whose users are those of deploy/redis/users.acl, set up with the very commands of docs/security.md."""

import re
import subprocess
from pathlib import Path

from tests.servers import Server, ServerKind

ROOT = Path(__file__).resolve().parent.parent
USERS = ("trainer", "worker", "operator", "viewer")
LIMIT_S = 30
ADMIN = "admin-of-the-test"


def documented(first_word: str) -> str:
    """The shell commands of docs/security.md that begin so."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/security.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(first_word)]
    return found


def shell(folder: Path, commands: str) -> str:
    """What commands print that see the repository's `deploy` in the current folder."""
    if not (folder / "deploy").exists():
        (folder / "deploy").symlink_to(ROOT / "deploy")
    words = ["bash", "-euc", commands]
    ran = subprocess.run(
        words, cwd=folder, capture_output=True, timeout=LIMIT_S, check=False, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


class GuardedServer:
    """A running server without a user `default`, whose users have one pool: `default`, or `math`."""

    def __init__(self, kind: ServerKind, folder: Path, *, pool: str = "default") -> None:
        told = shell(folder, documented("cp deploy/redis/users.acl"))
        self._passwords = dict(line.split() for line in told.splitlines())
        self._passwords["admin"] = ADMIN
        if pool != "default":
            shell(folder, documented("sed -i").replace("math", pool))
        users = folder / "users.acl"
        users.write_text(users.read_text() + f"user admin on >{ADMIN} ~* &* +@all\n")
        self.server = Server(kind, folder, ["--aclfile", str(users)])
        self.server.start()

    def url(self, user: str) -> str:
        """The server's URL with the user's login."""
        login = f"{user}:{self._passwords[user]}@"
        return self.server.url.replace("redis://", f"redis://{login}")

    def stop(self) -> None:
        """End the server."""
        self.server.kill()
