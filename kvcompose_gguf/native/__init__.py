"""ctypes lives here and nowhere else: find and load the library, declare its functions, status -> exception."""
