from __future__ import annotations

import socket

import pytest

from cluster.errors import ClusterError
from cluster.ports import check_port, choose_port


def test_chosen_port_can_be_used() -> None:
    port = choose_port("127.0.0.1")
    check_port(port, "127.0.0.1")
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use_is_refused(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ClusterError, match=f"--master-port {port}: the port is in use"):
            check_port(port, "127.0.0.1")


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"cannot listen on 192\.0\.2\.1"):
        check_port(21000, "192.0.2.1")
