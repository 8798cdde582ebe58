//! Servers that go on from another's memory, before their vCPUs have run.
use super::*;

/// A clone's vCPUs have not run: nothing is kept of what its caller was told has failed, whatever the policy.
#[test]
fn a_clone_that_cannot_be_let_run_is_undone_as_a_create_is() {
    let context = Context { now_ms: 10, policy: RestartPolicy::Always };
    let job = Job { id: OperationId(uuid::Uuid::from_u128(1)), kind: JobKind::Create };
    let restored = Life { job: Some(job), ..life(Phase::Resuming { vmm: vmm() }) };
    let trouble = Trouble { code: Code::MachineFailed, detail: "it was refused".to_owned() };
    let refused = step(&restored, Event::ResumeFailed(trouble), context).life;
    assert_eq!(refused.work(), Some(Work::Kill));
    let ended_after = step(&refused, ended(Reason::Asked), context).life;
    let ended_at_once = step(&restored, ended(Reason::TripleFault), context).life;
    // A daemon has died, and its VMM could not build what it was told to.
    let lost = step(&restored, Event::Found(Found::Alive(MachineState::Shell)), context).life;
    assert_eq!(lost.work(), Some(Work::Kill));
    let ended_later = step(&lost, ended(Reason::Asked), context).life;
    for life in [ended_after, ended_at_once, ended_later] {
        let released = step(&life, Event::Released { flushed: false, kept: false }, context).life;
        assert!(matches!(released.phase, Phase::Deleting { keep_volumes: false, .. }), "{released:?}");
        let purged = step(&released, Event::Purged, context);
        assert!(purged.gone && matches!(purged.ended[..], [(id, Verdict::Failed(_))] if id == job.id));
    }
    // One that was made already goes on as its policy says.
    let resumed = Life { job: None, ..restored };
    let ended = step(&resumed, ended(Reason::TripleFault), context).life;
    assert!(matches!(ended.phase, Phase::Releasing { then: Then::Decide(_) }), "{ended:?}");
}

/// What its machine was built of is not in its record any more, which says how it may go on and what it shares.
#[test]
fn a_clone_that_is_stopped_and_started_as_it_is_made_begins_anew() {
    let of = SavedOf::Clone { snapshot: SnapshotId::new() };
    let saved = Some(Saved { root: Digest([0; 32]), stored_bytes: 1, of });
    let create = OperationId::new();
    let mut life = Life { saved, ..Life::new(create, true) };
    let context = Context { now_ms: 10, policy: RestartPolicy::Always };
    for ask in [Ask::Stop { grace_ms: 0 }, Ask::Start] {
        let Ok(Asked::Joined(_, next)) = life.ask(ask, OperationId::new(), context) else {
            panic!("{ask:?}")
        };
        life = next.life;
    }
    let spawned = Spawned { vmm: vmm(), sandbox: None, cage: None, build: None };
    let made = Event::Made { volumes: Vec::new(), vmm: Some(spawned), restores: true };
    life = step(&life, made, context).life;
    assert_eq!(life.work(), Some(Work::Kill));
    for event in [ended(Reason::Asked), Event::Released { flushed: false, kept: false }] {
        life = step(&life, event, context).life;
    }
    assert_eq!(life.work(), Some(Work::Spawn));
    let spawned = Spawned { vmm: vmm(), sandbox: None, cage: None, build: None };
    life = step(&life, Event::Spawned(spawned), context).life;
    assert_eq!(life.work(), Some(Work::Boot { saved: None }));
    let booted = step(&life, Event::Booted, context);
    assert_eq!((&booted.life.phase, booted.life.shares), (&Phase::Running { vmm: vmm() }, None));
    assert_eq!(booted.ended, vec![(create, Verdict::Succeeded)]);
}
