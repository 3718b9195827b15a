"""FastLoDA in other libraries' pipelines. Each module needs only the library that it is named after."""
