"""Address at which the page is served."""

import socket
from ipaddress import ip_address
from typing import NamedTuple

from mae.errors import UserError

_FIRST_PORT, _PORTS = 7860, 100


class Address(NamedTuple):
    """Host, and a port or None for any free one."""

    host: str
    port: int | None

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    def free_port(self) -> int:
        """Return the port, or the first free one from 7860 on.

        Raises:
            UserError: if it is taken, or the host is no address of this machine.
        """
        reason = ""
        for port in range(_FIRST_PORT, _FIRST_PORT + _PORTS) if self.port is None else [self.port]:
            try:
                with socket.create_server((self.host, port)):
                    return port
            except OSError as error:
                reason = error.strerror or str(error)
        ports = f"{_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1}" if self.port is None else self.port
        raise UserError(f"{self.host} cannot be served at port {ports}: {reason}; give another --port or --host")
