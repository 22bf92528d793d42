"""The magics: parse, complete, bind results."""
