"""Getting work to a device and trials back. ``LEAVES`` lists the transports: a new one is a file and a line here."""

LEAVES = {
    "local": "edgejoule.fleet.local:Local",
}
