"""The server's certificate: loaded, refused in one line, and loaded again when its files are renewed."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from vpdeploy.errors import SpecError

_log = logging.getLogger(__name__)

_Signature = tuple[tuple[int, int, int], ...]


class Certificate:
    """A certificate with its key, as a TLS context for servers.

    Args:
        certfile: The certificate and those that vouch for it, as PEM.
        keyfile: Its private key, as PEM without a passphrase; None where the first file holds it.

    Attributes:
        context: The context; connections that begin after a renewal have the new certificate.
        pem: The key and the certificate as they are in the files, for whoever has no use for a context.

    Raises:
        SpecError: A file cannot be read, is no such file, or the two do not belong together.
    """

    def __init__(self, certfile: Path, keyfile: Path | None) -> None:
        self._certfile = certfile
        self._keyfile = keyfile
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(self.context)
        self.pem = self._read()
        self._seen = self._signature()
        self._complaint = ""

    def refresh(self) -> None:
        """Load the files again if they changed; what cannot be used is complained about once, and the old one stays."""
        try:
            seen = self._signature()
            if seen == self._seen:
                return
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a trial: a context keeps half of what fails
            self._load(self.context)
            self.pem = self._read()
        except (SpecError, OSError) as error:
            complaint = " ".join(str(error).split())
            if complaint != self._complaint:
                _log.error("the certificate stays as it was: %s", complaint)
            self._complaint = complaint
            return
        self._seen, self._complaint = seen, ""
        _log.info("certificate read again")

    def _load(self, context: ssl.SSLContext) -> None:
        for file in (self._certfile, self._keyfile):
            if file is not None:
                try:
                    file.open("rb").close()
                except OSError as error:
                    raise SpecError(f"{file}: cannot be read: {error.strerror}; expected a PEM file") from None
        try:
            context.load_cert_chain(self._certfile, self._keyfile, password=self._refuse_passphrase)
        except ssl.SSLError as error:
            files = f"{self._certfile}" if self._keyfile is None else f"{self._certfile} and {self._keyfile}"
            reason = f" ({error.reason.replace('_', ' ').lower()})" if error.reason else ""
            raise SpecError(f"{files}: not a certificate and its key{reason}; expected PEM files") from None
        except OSError as error:
            raise SpecError(f"{self._certfile}: cannot be read: {error.strerror}; expected a PEM file") from None

    def _read(self) -> tuple[bytes, bytes]:
        return (self._keyfile or self._certfile).read_bytes(), self._certfile.read_bytes()

    def _refuse_passphrase(self) -> str:
        # Without this, OpenSSL asks on the terminal.
        raise SpecError(f"{self._keyfile or self._certfile}: the key has a passphrase; expected one without")

    def _signature(self) -> _Signature:
        files = [file for file in (self._certfile, self._keyfile) if file is not None]
        return tuple((status.st_mtime_ns, status.st_ino, status.st_size) for status in (file.stat() for file in files))
