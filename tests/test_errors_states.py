"""Bad states and bad slots: the message names the part, what came and what is wanted."""

from collections.abc import Callable

import pytest
import torch
from problems import make_inputs, offsets, packed
from refusals import B, H, K, V, good, good_state, refuses

import tfla


class TestStates:
    def call(self, state: object, **options: object) -> Callable[[], object]:
        return lambda: tfla.mlstm(**good(), initial_state=state, **options)

    @pytest.mark.parametrize("value", ["text", 3, torch.zeros(3), (torch.zeros(B, H, K, V),)])
    def test_what_is_no_state(self, value: object) -> None:
        with pytest.raises(TypeError, match=r"initial_state .*tfla.State"):
            self.call(value)()

    def test_a_bare_memory_for_a_normalised_layer(self) -> None:
        bare = tfla.State(good_state().C, None, None)
        for call, name in (
            (self.call(bare), "initial_state"),
            (self.call(bare, input_gate="sigmoid", normalize=True), "initial_state"),
            (
                lambda: tfla.mlstm_step(**{n: t[:, 0] for n, t in good().items()}, state=bare),
                "state",
            ),
        ):
            refuses(ValueError, call, names=name, came="None", wanted="(C, n, m)")

    def test_a_normalised_state_for_a_layer_that_is_not(self) -> None:
        for options in ({"normalize": False}, {"input_gate": "sigmoid"}):
            refuses(
                ValueError,
                self.call(good_state(), **options),
                names="initial_state",
                came="tensor",
                wanted="(C, None, None)",
            )

    def test_half_a_normaliser(self) -> None:
        C, n, m = good_state()
        for half in (tfla.State(C, n, None), tfla.State(C, None, m)):
            for options in ({}, {"normalize": False}):
                with pytest.raises(ValueError, match="initial_state"):
                    self.call(half, **options)()

    @pytest.mark.parametrize("normalize", [True, False])
    def test_no_memory(self, normalize: bool) -> None:
        """A normaliser without its C is no state, and none at all is None, not three of them."""
        state = good_state()._replace(C=None) if normalize else tfla.State(None, None, None)
        call = self.call(state, normalize=normalize)
        refuses(TypeError, call, names="initial_state.C", came="None", wanted="Tensor")

    @pytest.mark.parametrize(
        ("part", "shape", "wanted"),
        [
            ("C", (B, H, V, K), (B, H, K, V)),
            ("C", (B + 1, H, K, V), (B, H, K, V)),
            ("C", (H, K, V), (B, H, K, V)),
            ("n", (B, H, V), (B, H, K)),
            ("n", (B, H, K, 1), (B, H, K)),
            ("m", (B, H, 1), (B, H)),
            ("m", (H,), (B, H)),
        ],
    )
    def test_wrong_shapes(self, part: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        state = good_state()._replace(**{part: torch.zeros(shape)})
        refuses(
            ValueError,
            self.call(state),
            names=f"initial_state.{part}",
            came=str(shape),
            wanted=str(wanted),
        )

    @pytest.mark.parametrize("part", ["C", "n", "m"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
    def test_wrong_dtypes(self, part: str, dtype: torch.dtype) -> None:
        state = good_state()
        state = state._replace(**{part: getattr(state, part).to(dtype)})
        refuses(
            TypeError,
            self.call(state),
            names=f"initial_state.{part}",
            came=str(dtype).removeprefix("torch."),
            wanted="float32",
        )

    def test_a_step_takes_bf16_for_c_and_n_but_not_for_m(self) -> None:
        C, n, m = good_state()
        given = {name: t[:, 0] for name, t in good().items()}
        tfla.mlstm_step(**given, state=tfla.State(C.bfloat16(), n.bfloat16(), m))
        refuses(
            TypeError,
            lambda: tfla.mlstm_step(**given, state=tfla.State(C, n, m.bfloat16())),
            names="state.m",
            came="bfloat16",
            wanted="float32",
        )

    def test_another_device(self) -> None:
        state = good_state()._replace(n=torch.zeros(B, H, K, device="meta"))
        refuses(ValueError, self.call(state), names="initial_state.n", came="meta", wanted="cpu")

    def test_a_part_that_is_no_tensor(self) -> None:
        state = tfla.State(good_state().C.tolist(), *good_state()[1:])
        refuses(TypeError, self.call(state), names="initial_state.C", came="list", wanted="Tensor")

    def test_as_many_rows_as_packed_sequences(self) -> None:
        x = make_inputs(packed(2, 3, dtype=torch.float32, H=H, K=K, V=V))
        state = good_state()._replace(C=torch.zeros(3, H, K, V))
        refuses(
            ValueError,
            lambda: tfla.mlstm(
                x.q, x.k, x.v, x.i, x.f, cu_seqlens=offsets((2, 3)), initial_state=state
            ),
            names="initial_state.C",
            came=str((3, H, K, V)),
            wanted=str((2, H, K, V)),
        )


class TestSteps:
    def call(self, state: tfla.State | None = None, **options: object) -> Callable[[], object]:
        given = {n: t[:, 0] for n, t in good().items()}
        return lambda: tfla.mlstm_step(**given, state=state or good_state(), **options)

    def test_no_state(self) -> None:
        given = {n: t[:, 0] for n, t in good().items()}
        with pytest.raises(TypeError, match="state"):
            tfla.mlstm_step(**given, state=None)

    @pytest.mark.parametrize("name", ["q", "f", "C"])
    def test_in_place_where_something_requires_grad(self, name: str) -> None:
        given, state = {n: t[:, 0] for n, t in good().items()}, good_state()
        if name == "C":
            state.C.requires_grad_()
        else:
            given[name] = given[name].clone().requires_grad_()
        before = [s.clone() for s in state]
        with pytest.raises((ValueError, RuntimeError), match="inplace.*(grad|autograd)"):
            tfla.mlstm_step(**given, state=state, inplace=True)
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
        with torch.no_grad():
            tfla.mlstm_step(**given, state=state, inplace=True)

    def test_slots_without_in_place(self) -> None:
        with pytest.raises(ValueError, match="slots.*inplace=True"):
            self.call(slots=torch.tensor([0, 1]))()

    @pytest.mark.parametrize(
        "slots", [torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([[0, 1]]), [0, 1]]
    )
    def test_slots_of_a_wrong_kind(self, slots: object) -> None:
        with pytest.raises((TypeError, ValueError), match=r"slots must be .*int32 or int64"):
            self.call(slots=slots, inplace=True)()

    @pytest.mark.parametrize("slots", [[0, 2], [-1, 0], [0, 10**6]])
    def test_slots_out_of_range_change_nothing(self, slots: list[int]) -> None:
        state = good_state()
        refuses(
            ValueError,
            self.call(state, slots=torch.tensor(slots), inplace=True),
            names="slots",
            came=str(slots),
            wanted="2 rows",
        )
        assert all((s == 0).all() for s in state)

    def test_slots_given_twice(self) -> None:
        refuses(
            ValueError,
            self.call(slots=torch.tensor([1, 1]), inplace=True),
            names="slots",
            came="[1, 1]",
            wanted="distinct",
        )

    @pytest.mark.parametrize("part", ["C", "n", "m"])
    def test_in_place_on_a_state_that_overlaps_itself(self, part: str) -> None:
        """An expanded state has one row for the whole batch: there is nothing right to write. It
        is said before anything is."""
        state = good_state()
        state = state._replace(**{part: getattr(state, part)[:1].expand_as(getattr(state, part))})
        refuses(
            ValueError,
            self.call(state, inplace=True),
            names=f"state.{part}",
            came="strides (0, ",
            wanted=".clone()",
        )
        assert all((s == 0).all() for s in state)

    @pytest.mark.parametrize("part", ["C", "n", "m"])
    def test_in_place_on_rows_that_overlap(self, part: str) -> None:
        """Windows of one buffer: a row would be written over half of the next one."""
        state = good_state()
        t = getattr(state, part)
        step = t.stride(0) // 2
        window = torch.zeros(2 * t.numel()).as_strided(t.shape, (step, *t.stride()[1:]))
        refuses(
            ValueError,
            self.call(state._replace(**{part: window}), inplace=True),
            names=f"state.{part}",
            came=f"strides ({step}, ",
            wanted=".clone()",
        )
        assert (window == 0).all()
