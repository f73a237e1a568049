"""The files of the page, as they are served."""

from __future__ import annotations

import re

import httpx
import pytest
from server_running import Running

from dapji.server.page.site import static_files


def test_every_file_comes_with_what_protects_its_reader(server: Running) -> None:
    for name in static_files():
        answer = httpx.get(f"{server.url}/static/{name}")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = httpx.get(answer.url, headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"] == policy
    assert httpx.get(server.url).content == static_files()["chat.html"].data


def test_nothing_comes_from_elsewhere() -> None:
    for name, file in static_files().items():
        text = file.data.decode()
        assert not re.search(r"""(src=|href=|url\(|import |from |fetch\()\s*["'(]?(https?:)?//""", text), name
        assert not re.search(r"<style|\sstyle=|\son\w+=|eval\(|new Function|@import", text), name


@pytest.mark.parametrize("path", ["..%2fsite.py", "%2e%2e/site.py", "../site.py", "none.js", "", ".", "%00"])
def test_no_path_leads_to_other_files(server: Running, path: str) -> None:
    answer = httpx.get(f"{server.url}/static/{path}")
    assert answer.status_code == 404
    assert "import" not in answer.text
