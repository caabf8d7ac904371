"""Server: the address, the token and the reader's name; who answers there."""

from __future__ import annotations

import functools
import getpass

import qt
from slicer.i18n import tr as _

from PulmonaryEmbolismLib.answers import Server
from PulmonaryEmbolismLib.client import Client
from PulmonaryEmbolismLib.jobs import Cancelled
from PulmonaryEmbolismLib.transport import ServerError

SETTINGS = "PulmonaryEmbolism/"
KEPT_ADDRESSES = 8


class Connection:
    def __init__(self, panel) -> None:
        self.panel = panel
        self.ui = ui = panel.ui
        panel.on_click([(ui.connectButton, self.connect)])
        panel.connect(ui.addressBox.lineEdit(), "returnPressed()", self.connect)
        panel.connect(ui.tokenEdit, "returnPressed()", self.connect)
        self._restore_settings()

    def connect(self) -> None:
        ui, runner = self.ui, self.panel.runner
        try:
            client = Client(ui.addressBox.currentText, ui.tokenEdit.text, ui.readerEdit.text.strip())
        except ServerError as error:
            self._not_connected(error)
            return
        runner.drop("connect")
        ui.serverLabel.text = _("Connecting to {address} …").format(address=client.address)
        done = functools.partial(self._connected, client)
        runner.submit("connect", _("Connecting"), lambda job: client.connect(), done, self._not_connected)

    def show_model(self) -> None:
        """All is well, and which model is served."""
        text = _("Connected. Model: {model}").format(model=self.panel.server.model)
        if self.panel.server.blinded:
            text += " " + _("Blinded: results are shown after you have submitted a study.")
        self.ui.serverLabel.text = text

    def _connected(self, client: Client, server: Server) -> None:
        self.ui.readerEdit.text = client.reader
        self.panel.use(client, server)
        self._save_settings(client)
        self.show_model()
        self.ui.serverSection.collapsed = True
        self.ui.serverSection.text = _("Server: {address}").format(address=server.address.split("//")[1])

    def _not_connected(self, error: Exception) -> None:
        self.ui.serverLabel.text = _("Cancelled.") if isinstance(error, Cancelled) else str(error)
        self.ui.serverSection.collapsed = False
        self.panel.enable()

    def _restore_settings(self) -> None:
        settings, ui = qt.QSettings(), self.ui
        addresses = str(settings.value(SETTINGS + "addresses") or "http://127.0.0.1:8000").split()
        ui.addressBox.clear()
        ui.addressBox.addItems(addresses)
        ui.tokenEdit.text = str(settings.value(SETTINGS + "token") or "")
        ui.readerEdit.text = str(settings.value(SETTINGS + "reader") or getpass.getuser())

    def _save_settings(self, client: Client) -> None:
        settings, box = qt.QSettings(), self.ui.addressBox
        known = [box.itemText(i) for i in range(box.count)]
        addresses = [client.address, *(a for a in known if a != client.address)][:KEPT_ADDRESSES]
        settings.setValue(SETTINGS + "addresses", " ".join(addresses))
        settings.setValue(SETTINGS + "token", client.token)
        settings.setValue(SETTINGS + "reader", client.reader)
        box.clear()
        box.addItems(addresses)
