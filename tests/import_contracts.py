"""A contract of our own for import-linter; pyproject.toml names it."""

import graphlib

from importlinter import Contract, ContractCheck, fields, output
from importlinter.application import contract_utils


class AcyclicContract(Contract):
    """No file imports itself through others, inside functions or for types either.

    The contract ``acyclic_siblings`` says less: it overlooks a module that imports from
    the ``__init__`` of its own package.
    """

    type_name = "acyclic"
    ignore_imports = fields.SetField(
        subfield=fields.ImportExpressionField(), required=False
    )

    def check(self, graph, verbose):
        removal = contract_utils.remove_ignored_imports_and_report(
            graph=graph,
            ignore_imports=self.ignore_imports,
            unmatched_alerting=contract_utils.AlertLevel.ERROR,
        )
        imports = {
            module: sorted(graph.find_modules_directly_imported_by(module))
            for module in sorted(graph.modules)
        }
        try:
            graphlib.TopologicalSorter(imports).prepare()
            circle = []
        except graphlib.CycleError as error:
            # Reversed, so that each module imports the next one.
            circle = error.args[1][::-1]
        return ContractCheck(
            kept=not circle,
            warnings=list(removal.warnings),
            ignored_import_count=removal.ignored_import_count,
            metadata={"circle": circle},
        )

    def render_broken_contract(self, check):
        output.print_error("These modules import each other in a circle:")
        output.print_error("\n-> ".join(check.metadata["circle"]))
