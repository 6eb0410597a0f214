"""Which integer kernels does this machine run, and why: python tools/isa.py; ONEDNN_MAX_CPU_ISA=AVX2 pretends less."""

from modiff.kernels.dispatch import plan, this_machine
from modiff.kernels.encode import choose_encoder
from modiff.kernels.problem import Problem

CONV = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


def main() -> None:
    """The instruction level, the self-test, the input side, and the backend of typical layers."""
    isa = this_machine()
    trust = isa.trust
    print(f"instructions    {isa.level}, oneDNN's integer operators {'present' if isa.onednn else 'missing'}")
    print(f"self-test       few bits {'exact' if trust.bounded else 'WRONG'}, all codes "
          f"{'exact' if trust.full else 'saturate'}{' ' + trust.detail if trust.detail else ''}")  # fmt: skip
    print(f"input side      {choose_encoder().backend}: {choose_encoder().reason}")
    for bits, weight_max in ((8, 127), (7, 127), (4, 127), (8, 63), (8, 8)):
        for name, problem in (
            ("linear 1152", Problem(1152, 1152, bits=bits, weight_max=weight_max)),
            ("conv 320 3x3", Problem(320, 320, **CONV, bits=bits, weight_max=weight_max)),
        ):
            backend, reason, _ = plan(problem, isa)
            print(f"A{bits}, weights up to {weight_max:<4} {name:<13} {backend:<12} {reason}")


if __name__ == "__main__":
    main()
