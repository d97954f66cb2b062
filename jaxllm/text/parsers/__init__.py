"""What a model wrote, told apart while it is being written: reasoning, answer, tool calls.

A parser is a generator that reads from a `Reader` and yields events, for example one that takes `!call NAME;`
for a call without arguments:

    def parse(reader, tools):
        while (yield from reader.until(("!call ",), Content)):
            reader.take(len("!call "))
            name = yield from reader.collect((";",))
            yield CallStart(name or "")
            yield Arguments("{}")
            yield from reader.accept(";")

    register_tool_parser("shouted", ToolParser(parse))

It need not know that its text comes in pieces. A file with these lines, and what they import, makes
`--tool-call-parser shouted` known where it is given to `--tool-parser-plugin`.
"""
