"""Accounts that are saved, loaded, copied and merged: every step that was taken counts, and none counts twice."""

import copy
import io
import json
import multiprocessing
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastloda import PrivacyAccountant
from fastloda.accounting.history import HistoryAccountant

MECHANISMS = [(1.0, 0.1), (1.0, 0.2), (3.0, 0.1)]  # (noise multiplier, sampling rate)


def through_json(state):
    return json.loads(json.dumps(state))


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Histories(RuleBasedStateMachine):
    """Accounts, each with the set of steps that it should know; every step has its own number, whichever account takes it."""

    def __init__(self):
        super().__init__()
        self.accounts = [(self.account(), set())]
        self.saved = []
        self.taken = 0

    def account(self):
        return HistoryAccountant()

    def take(self, account, mechanism):
        account.step(noise_multiplier=mechanism[0], sample_rate=mechanism[1])

    def count(self, account):
        return Counter({item[:2]: item[2] for item in account.history})

    @rule(data=st.data(), mechanism=st.sampled_from(MECHANISMS), times=st.integers(1, 5))
    def step(self, data, mechanism, times):
        account, known = data.draw(st.sampled_from(self.accounts))
        for _ in range(times):
            self.take(account, mechanism)
            known.add((self.taken, mechanism))
            self.taken += 1

    @rule()
    def begin(self):
        self.accounts.append((self.account(), set()))

    @rule(data=st.data(), via=st.sampled_from([through_json, through_torch, copy.deepcopy]))
    def save(self, data, via):
        account, known = data.draw(st.sampled_from(self.accounts))
        self.saved.append((via(account.state_dict()), set(known)))

    @rule(data=st.data())
    def load(self, data):
        if self.saved:
            account, known = data.draw(st.sampled_from(self.accounts))
            state, of_state = data.draw(st.sampled_from(self.saved))
            account.load_state_dict(state)
            known |= of_state

    @rule(data=st.data(), via=st.sampled_from([copy.deepcopy, lambda account: pickle.loads(pickle.dumps(account))]))
    def duplicate(self, data, via):
        account, known = data.draw(st.sampled_from(self.accounts))
        self.accounts.append((via(account), set(known)))

    @invariant()
    def every_step_counts_once(self):
        for account, known in self.accounts:
            assert self.count(account) == Counter(mechanism for _, mechanism in known)


class Runs(Histories):
    """The same state machine with accountants of one mechanism."""

    def account(self):
        return PrivacyAccountant(0.1, 1.0)

    def take(self, account, mechanism):
        account.step()

    def count(self, account):
        return account.steps

    @invariant()
    def every_step_counts_once(self):
        for account, known in self.accounts:
            assert account.steps == len(known)


Histories.TestCase.settings = Runs.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestHistories, TestRuns = Histories.TestCase, Runs.TestCase


def steps(account, count):
    for _ in range(count):
        account.step(noise_multiplier=1.0, sample_rate=0.1)
    return account


def test_another_accounts_record_is_added():
    one, other = steps(HistoryAccountant(), 120), steps(HistoryAccountant(), 80)
    for _ in range(2):
        one.load_state_dict(other.state_dict())
        assert one.history == [(1.0, 0.1, 200)]
    both = HistoryAccountant()
    both.load_state_dict(one.state_dict())
    assert both.get_epsilon(1e-5) == one.get_epsilon(1e-5) == PrivacyAccountant(0.1, 1.0).epsilon(1e-5, 200)


def test_two_go_on_from_one_checkpoint():
    first = steps(HistoryAccountant(), 10)
    shared = first.state_dict()
    one, other = HistoryAccountant(), HistoryAccountant()
    for account, more in ((one, 3), (other, 4), (first, 5)):
        account.load_state_dict(shared)
        steps(account, more)
    one.load_state_dict(other.state_dict())
    assert len(one) == 10 + 3 + 4
    first.load_state_dict(one.state_dict())
    assert len(first) == 10 + 3 + 4 + 5


def _child(account, pipe):
    steps(account, 7)
    pipe.send(account.state_dict())


def test_a_forked_child_counts_for_itself():
    parent = steps(HistoryAccountant(), 5)
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(parent, theirs))
    child.start()
    steps(parent, 9)
    parent.load_state_dict(mine.recv())
    child.join()
    assert len(parent) == 5 + 9 + 7


def test_ids_cannot_be_guessed():
    torch.manual_seed(0)
    ids = {steps(HistoryAccountant(), 1).state_dict()["ids"][0] for _ in range(50)}
    assert len(ids) == 50 and all(len(id) == 32 and int(id, 16) >= 0 for id in ids)


def test_opacus_own_record_is_added():
    theirs = {"history": [(1.0, 0.1, 3), (2.0, 0.1, 4), (1.0, 0.1, 5)], "mechanism": "prv"}  # one noise occurs twice
    account = steps(HistoryAccountant(), 2)
    account.load_state_dict(theirs)
    assert account.history == [(1.0, 0.1, 10), (2.0, 0.1, 4)]
    account.load_state_dict(theirs)  # this may be the record of another run of the same length
    assert len(account) == 2 + 12 + 12


def test_opacus_takes_our_record():
    from opacus.accountants import PRVAccountant

    account = steps(HistoryAccountant(), 4)
    theirs = PRVAccountant()
    theirs.load_state_dict(account.state_dict())
    assert [tuple(item) for item in theirs.history] == account.history
    again = HistoryAccountant()
    again.load_state_dict(theirs.state_dict())
    assert again.history == account.history


@pytest.mark.parametrize(
    "change",
    [
        {"history": [[1.0, 0.1, -1]]},
        {"history": [[1.0, 0.1, 2.5]]},
        {"history": [[1.0, 0.1, "2"]]},
        {"history": [[-1.0, 0.1, 2]]},
        {"history": [[1.0, 1.5, 2]]},
        {"history": [[float("nan"), 0.1, 2]]},
        {"history": [[1.0, 0.1]]},
        {"history": None},
        {"history": 3},
        {"ids": []},
        {"ids": [7]},
        {"ids": None},
        {"ids": ["a", "b"]},
    ],
    ids=repr,
)
def test_malformed_histories_are_refused_and_change_nothing(change):
    account = steps(HistoryAccountant(), 4)
    with pytest.raises(ValueError, match="malformed privacy record"):
        account.load_state_dict(steps(HistoryAccountant(), 2).state_dict() | change)
    assert account.history == [(1.0, 0.1, 4)]


@pytest.mark.parametrize("state", [None, [], {}, "record", 3], ids=repr)
def test_what_is_no_history_is_refused(state):
    with pytest.raises(ValueError, match="malformed privacy record"):
        HistoryAccountant().load_state_dict(state)


@pytest.mark.parametrize("step", [{"noise_multiplier": float("nan")}, {"sample_rate": 1.5}, {"noise_multiplier": -1}])
def test_a_step_that_cannot_be_is_not_counted(step):
    account = HistoryAccountant()
    with pytest.raises(ValueError, match="noise_multiplier|sample_rate"):
        account.step(**{"noise_multiplier": 1.0, "sample_rate": 0.1} | step)
    assert account.history == [] and account.get_epsilon(1e-5) == 0


def test_numbers_of_numpy_are_plain_in_the_record():
    account = HistoryAccountant()
    account.step(noise_multiplier=np.float64(1.0), sample_rate=np.float32(0.5))
    assert through_torch(account.state_dict()) == through_json(account.state_dict())


def test_an_accountants_record_goes_on_from_a_higher_count():
    """`DPTrainer` writes such a record before each step, and reads it when it resumes."""
    run = PrivacyAccountant(0.1, 1.0)
    run.step(5)
    checkpoint, intended = run.state_dict(), run.state_dict() | {"steps": 8}
    again = PrivacyAccountant(0.1, 1.0)
    for record, known in ((checkpoint, 5), (intended, 8), (checkpoint, 8)):
        again.load_state_dict(record)
        assert again.steps == known
    again.step(2)
    third = PrivacyAccountant(0.1, 1.0)
    for record, known in ((again.state_dict(), 10), (again.state_dict() | {"steps": 11}, 11), (intended, 11)):
        third.load_state_dict(through_json(record))
        assert third.steps == known


def test_a_record_without_an_id_is_added():
    run = PrivacyAccountant(0.1, 1.0)
    run.step(5)
    run.load_state_dict({"version": 1, "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 3, "method": "prv"})
    assert run.steps == 8
