from __future__ import annotations

import json

import pytest

from cluster.ranktable import device_addresses, dump, rank_table

HCCN_CONF = """\
address_0=192.168.100.101
netmask_0=255.255.255.0
netdetect_0=192.168.100.1
address_1 = 192.168.101.101
#address_2=192.168.102.101
address_10=fe80::10
"""


def test_addresses_of_hccn_conf() -> None:
    assert device_addresses(HCCN_CONF) == {
        0: "192.168.100.101",
        1: "192.168.101.101",
        10: "fe80::10",
    }
    assert device_addresses("") == {}


def test_table_of_one_server() -> None:
    text = dump(rank_table("10.0.0.1", (10, 1), device_addresses(HCCN_CONF)))
    assert json.loads(text) == {
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "10.0.0.1",
                "device": [
                    {"device_id": "1", "device_ip": "192.168.101.101", "rank_id": "0"},
                    {"device_id": "10", "device_ip": "fe80::10", "rank_id": "1"},
                ],
            }
        ],
        "status": "completed",
    }


def test_every_scalar_is_a_string() -> None:
    def scalars(value: object) -> list[object]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in scalars(item)]
        if isinstance(value, list):
            return [leaf for item in value for leaf in scalars(item)]
        return [value]

    assert all(isinstance(leaf, str) for leaf in scalars(rank_table("a", (0,), {0: "1.2.3.4"})))


def test_device_without_address_is_an_error() -> None:
    with pytest.raises(KeyError):
        rank_table("a", (0, 1), {0: "1.2.3.4"})
