"""The ctypes layer: finds and loads the library, declares its functions, and turns statuses into exceptions."""
