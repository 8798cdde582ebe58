//! Moves, and handovers on one host, that are torn apart at every word the two ends say: the link cut, or either end killed,
//! before the word is heard or after. Somebody then settles what the ends cannot know, by what can be seen of both; exactly one machine runs, and
//! what it remembers is right.
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use sys::pidfd::Signal;
use wire::control::{Command, MachineState, Reply};
use wire::migration::{MigrationStatus, Mode, Owner, Phase, SendLimits};
use wire::transfer::{Head, Kind, Open, Word};

use crate::probe_guest::{self, numbers};
use crate::vmm_driver::{Machine, Vmm};

/// Everything that is said, and the phases of both ends as it is.
const WORDS: [&str; 15] = [
    "open",
    "prepared",
    "round",
    "part",
    "console",
    "last round",
    "end",
    "state",
    "ready",
    "commit",
    "released",
    "block",
    "sync",
    "synced",
    "disk's end",
];

/// What is said where memory and disks stay where they are.
const WORDS_OF_HANDOVER: [&str; 7] = ["open", "prepared", "end", "state", "ready", "commit", "released"];

/// What is said, or asked for, where memory is owed when the target's machine runs.
const WORDS_OF_OWING: [&str; 16] = [
    "open",
    "prepared",
    "round",
    "part",
    "owed",
    "told",
    "last round",
    "end",
    "state",
    "ask",
    "answer",
    "ready",
    "commit",
    "released",
    "disk's end",
    "whole",
];

/// All of these.
const LISTS: [&[&str]; 3] = [&WORDS, &WORDS_OF_HANDOVER, &WORDS_OF_OWING];

/// What no link is torn at: the first three are said as one that has its place is, memory's stream, a part and a block; the others
/// only where the move has failed already.
const NOT_TORN: [&str; 5] = ["disk", "zero", "hole", "abort", "refused"];

/// What is said as an end is in this phase, or comes to it. A new phase has nothing, and does not compile without.
fn said_in(phase: Phase) -> &'static [&'static str] {
    match phase {
        Phase::Greet => &["open", "prepared"],
        Phase::Rounds => &["round", "part", "block"],
        Phase::Pause | Phase::LastRound => &["last round", "end"],
        Phase::State => &["state"],
        Phase::Ready => &["ready"],
        Phase::Commit => &["commit"],
        Phase::Release => &["released"],
        Phase::Owing => &["ask", "answer"],
        Phase::Moved => &["released", "whole"],
        // What the others come to when they are torn.
        Phase::Returned | Phase::Dropped => &[],
    }
}

/// How the machine's memory and disk get to the target.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Copied,
    Owed,
    Handed,
}

impl Way {
    fn words(self) -> &'static [&'static str] {
        match self {
            Way::Copied => &WORDS,
            Way::Owed => &WORDS_OF_OWING,
            Way::Handed => &WORDS_OF_HANDOVER,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Cut,
    KillSource,
    KillTarget,
}

/// When, seen from the word.
#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    Before,
    After,
    /// Another word is carried in its place.
    Instead,
}

/// The link of a machine and its disk. It stops at a word, tells, and breaks when it is told to.
struct Link {
    reached: Receiver<()>,
    go_on: Sender<()>,
    threads: Vec<std::thread::JoinHandle<()>>,
    streams: Vec<(UnixStream, UnixStream)>,
}

impl Link {
    fn new(streams: Vec<(UnixStream, UnixStream)>, word: &'static str, when: When) -> Link {
        let (tell, reached) = channel();
        let mut threads = Vec::new();
        let mut senders = Vec::new();
        let both = |(source, target): &(UnixStream, UnixStream)| {
            let copy = |stream: &UnixStream| stream.try_clone().unwrap();
            [(copy(source), copy(target)), (copy(target), copy(source))]
        };
        for (from, to) in streams.iter().flat_map(both) {
            let tell = tell.clone();
            let (go_on, wait) = channel::<()>();
            senders.push(go_on);
            threads.push(std::thread::spawn(move || {
                if let Err(error) = carry(&from, &to, word, when, &tell, &wait) {
                    println!("the link ended: {error:?}");
                }
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            }));
        }
        let (go_on, told) = channel::<()>();
        threads.push(std::thread::spawn(move || {
            // Whoever waits is let go by the end of the senders.
            let _ = told.recv();
            drop(senders);
        }));
        Link { reached, go_on, threads, streams }
    }

    fn end(self) {
        for (source, target) in &self.streams {
            // One that is gone already is as good.
            let _ = source.shutdown(Shutdown::Both);
            let _ = target.shutdown(Shutdown::Both);
        }
        drop(self.go_on);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// All that follows a head. Of what is packed the head does not say how much that is.
fn body(head: &Head, from: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    let bytes = match head.kind {
        Kind::Zero | Kind::Hole | Kind::Ask => 0,
        Kind::Packed => {
            let mut count = [0; 4];
            from.read_exact(&mut count)?;
            body.extend(count);
            u32::from_le_bytes(count)
        }
        _ => head.length,
    };
    body.resize(body.len() + bytes as usize, 0);
    let rest = body.len() - bytes as usize;
    from.read_exact(&mut body[rest..])?;
    Ok(body)
}

/// What is said by its name in the lists. A new kind or word has none, and does not compile without.
fn name_of(kind: Kind, word: Option<Word>, is_disk: bool, has_ended: bool) -> &'static str {
    match kind {
        Kind::Open if is_disk => "disk",
        Kind::Open => "open",
        Kind::Part | Kind::Zero | Kind::Packed if has_ended => "answer",
        Kind::Part | Kind::Packed => "part",
        Kind::Zero => "zero",
        Kind::Console => "console",
        Kind::State => "state",
        Kind::End if is_disk => "disk's end",
        Kind::End => "end",
        Kind::Block => "block",
        Kind::Hole => "hole",
        Kind::Sync if is_disk => "sync",
        Kind::Sync => "told",
        Kind::Owed => "owed",
        Kind::Ask => "ask",
        Kind::Word => match word {
            Some(Word::Prepared) => "prepared",
            Some(Word::Round { last: false, .. }) => "round",
            Some(Word::Round { last: true, .. }) => "last round",
            Some(Word::Ready) => "ready",
            Some(Word::Commit) => "commit",
            Some(Word::Released) => "released",
            Some(Word::Synced) => "synced",
            Some(Word::Whole) => "whole",
            Some(Word::Abort { .. }) => "abort",
            Some(Word::Refused { .. }) => "refused",
            None => "nonsense",
        },
    }
}

/// Carries frames one way until the word comes, or either end is gone.
fn carry(
    mut from: &UnixStream,
    mut to: &UnixStream,
    word: &str,
    when: When,
    tell: &Sender<()>,
    wait: &Receiver<()>,
) -> Result<(), Box<dyn std::error::Error>> {
    let (mut is_disk, mut has_ended) = (false, false);
    loop {
        let head = Head::read(&mut from)?;
        let body = body(&head, &mut from)?;
        is_disk |= Open::parse(&body).is_ok_and(|open| open.disk.is_some());
        let said = name_of(head.kind, Word::parse(&body).ok(), is_disk, has_ended);
        let has_place = |name: &str| LISTS.into_iter().flatten().any(|listed| *listed == name);
        assert!(has_place(said) || NOT_TORN.contains(&said), "{said:?} has no place in the lists");
        has_ended |= head.kind == Kind::End;
        if said == word && when != When::After {
            if when == When::Instead {
                Word::Ready.write(&mut to)?;
            }
            let _ = tell.send(());
            let _ = wait.recv();
            return Ok(());
        }
        to.write_all(&head.bytes())?;
        to.write_all(&body)?;
        if said == word {
            let _ = tell.send(());
            let _ = wait.recv();
            return Ok(());
        }
    }
}

fn machine(disk: &File) -> Machine {
    let mut machine =
        Machine::new(probe_guest::path(), "write=64,7,64 dirty=12,200,30 ticks=2 verify=64,7,64 loop");
    machine.disk(disk.try_clone().unwrap(), |_| {});
    machine
}

/// Where an end stands when nothing more comes of itself.
fn rest(vmm: &mut Vmm) -> MigrationStatus {
    loop {
        let status = vmm.migration();
        if status.phase.is_end() || status.in_doubt || status.link_lost {
            return status;
        }
        std::thread::yield_now();
    }
}

fn settle(vmm: &mut Vmm, owner: Owner) -> Phase {
    vmm.command(Command::SettleMigration { owner }).unwrap();
    loop {
        let phase = vmm.migration().phase;
        if phase.is_end() || phase == Phase::Owing {
            return phase;
        }
        std::thread::yield_now();
    }
}

fn runs(vmm: &mut Vmm) -> bool {
    match vmm.command(Command::Hello { protocol: 1 }) {
        Ok(Reply::Hello { state, .. }) => state == MachineState::Running,
        other => panic!("{other:?}"),
    }
}

/// Lives on, remembers everything, and its clock went only forward.
fn check_life(vmm: &mut Vmm, words: &str) {
    let console = vmm.console();
    let rounds = console.matches("probe: dirty ok").count();
    vmm.wait_for_times("probe: dirty ok", rounds + 2);
    vmm.wait_for_times("probe: verify ok", rounds + 1);
    let console = vmm.console();
    // The last line may be half written.
    let console = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    assert!(!console.contains("FAILED") && !console.contains("broken"), "{words}: {console}");
    let ticks = numbers(console, "ns");
    assert!(ticks.is_sorted(), "{words}: the clock stepped back: {ticks:?}");
}

/// Joins both ends again where memory is owed, until none is.
fn mend(source: &mut Vmm, target: &mut Vmm) {
    if target.migration().phase == Phase::Owing {
        let (near, far) = UnixStream::pair().unwrap();
        source.try_reconnect(&[near.into()]).unwrap();
        target.try_reconnect(&[far.into()]).unwrap();
        while target.migration().phase == Phase::Owing {
            std::thread::yield_now();
        }
    }
}

/// Begins to move a machine and its disk over a link of these streams, two rounds at least.
fn copy(
    source: &mut Vmm,
    target: &mut Vmm,
    link: impl FnOnce(Vec<(UnixStream, UnixStream)>) -> Link,
) -> Link {
    let onto = tempfile::tempfile().unwrap();
    onto.set_len(4 << 20).unwrap();
    let (near, source_end) = UnixStream::pair().unwrap();
    let (far, target_end) = UnixStream::pair().unwrap();
    let (disk_near, disk_source_end) = UnixStream::pair().unwrap();
    let (disk_far, disk_target_end) = UnixStream::pair().unwrap();
    let link = link(vec![(source_end, target_end), (disk_source_end, disk_target_end)]);
    target.try_receive_with_disks(machine(&onto), vec![far.into()], vec![disk_far.into()]).unwrap();
    // The guest writes 6 MiB in this time.
    let limits = SendLimits { downtime_ms: 40, bandwidth_bytes_per_s: None, ..SendLimits::default() };
    source.try_send_with_disks(vec![near.into()], vec![disk_near.into()], limits).unwrap();
    link
}

/// Begins to hand a machine over, whose disk this is.
fn hand_over(
    source: &mut Vmm,
    target: &mut Vmm,
    disk: &File,
    link: impl FnOnce(Vec<(UnixStream, UnixStream)>) -> Link,
) -> Link {
    let handles = source.handles().unwrap();
    let (near, source_end) = UnixStream::pair().unwrap();
    let (far, target_end) = UnixStream::pair().unwrap();
    let link = link(vec![(source_end, target_end)]);
    target.try_take_over(machine(disk), source, &handles, far.into()).unwrap();
    source.try_hand_over(&near.into()).unwrap();
    link
}

/// One move that is torn. Answers who has the machine then, if it lives.
fn tear(way: Way, word: &'static str, when: When, fault: Fault) -> Option<Owner> {
    let words = format!("{way:?} {fault:?} {when:?} {word:?}");
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(4 << 20).unwrap();
    let mut source = Vmm::boot(machine(&disk));
    source.wait_for_console("probe: dirty ok");
    let mut target = Vmm::start();
    let link = |streams| Link::new(streams, word, when);
    let link = match way {
        Way::Copied => copy(&mut source, &mut target, link),
        Way::Owed => {
            (source.mode, target.mode) = (Mode::PostCopy, Mode::PostCopy);
            copy(&mut source, &mut target, link)
        }
        Way::Handed => hand_over(&mut source, &mut target, &disk, link),
    };
    if link.reached.recv().is_err() {
        let (at_source, at_target) = (source.migration(), target.migration());
        // The guest may have written nothing while its memory went, or so little that it came with the rest.
        if way == Way::Owed && matches!(word, "owed" | "ask" | "answer") && at_source.phase == Phase::Moved {
            link.end();
            return tear(way, word, when, fault);
        }
        panic!("{words}: it was never said: {at_source:?} {at_target:?}");
    }
    match fault {
        Fault::Cut => {}
        Fault::KillSource => drop((source.signal(Signal::SIGKILL), source.wait_for_end())),
        Fault::KillTarget => drop((target.signal(Signal::SIGKILL), target.wait_for_end())),
    }
    link.end();
    match fault {
        Fault::Cut => {
            let (at_source, at_target) = (rest(&mut source), rest(&mut target));
            let had = (at_source.phase, at_target.phase);
            match had {
                (_, Phase::Ready | Phase::Owing | Phase::Moved)
                    if way == Way::Owed && had.0 != Phase::Returned =>
                {
                    // What it has by itself it is told once more.
                    assert_ne!(settle(&mut target, Owner::Here), Phase::Dropped, "{words}");
                    assert_ne!(settle(&mut source, Owner::There), Phase::Returned, "{words}");
                    mend(&mut source, &mut target);
                }
                (Phase::Commit, Phase::Ready) => {
                    assert_eq!(settle(&mut target, Owner::Here), Phase::Moved, "{words}");
                    assert_eq!(settle(&mut source, Owner::There), Phase::Moved, "{words}");
                }
                (Phase::Commit, Phase::Moved) => {
                    assert_eq!(settle(&mut source, Owner::There), Phase::Moved, "{words}");
                }
                (Phase::Returned, Phase::Ready) => {
                    assert_eq!(settle(&mut target, Owner::There), Phase::Dropped, "{words}");
                }
                (Phase::Returned, Phase::Dropped) | (Phase::Moved, Phase::Moved) => {}
                other => panic!("{words}: {other:?} {at_source:?} {at_target:?}"),
            }
            let (here, there) = (runs(&mut source), runs(&mut target));
            assert!(here != there, "{words}: {had:?}, source runs: {here}, target runs: {there}");
            let survivor = if here { &mut source } else { &mut target };
            check_life(survivor, &words);
            Some(if here { Owner::Here } else { Owner::There })
        }
        Fault::KillSource => match rest(&mut target).phase {
            // It died before the target had all of it, as any VMM dies.
            Phase::Dropped => {
                assert!(!runs(&mut target), "{words}");
                None
            }
            Phase::Ready | Phase::Owing => {
                // What was owed went with it: the guest stands where it needs that, and is not let go with anything else.
                if settle(&mut target, Owner::Here) == Phase::Owing {
                    assert!(way == Way::Owed && target.migration().progress.left_bytes > 0, "{words}");
                    return None;
                }
                check_life(&mut target, &words);
                Some(Owner::There)
            }
            Phase::Moved => {
                check_life(&mut target, &words);
                Some(Owner::There)
            }
            other => panic!("{words}: {other:?}"),
        },
        Fault::KillTarget => {
            let told_release = target.last_words().iter().any(|status| status.phase == Phase::Release);
            match rest(&mut source).phase {
                Phase::Returned => {}
                // It may have run, and written to the disk: the machine died with it.
                Phase::Commit if told_release => {
                    assert_ne!(settle(&mut source, Owner::There), Phase::Returned, "{words}");
                }
                Phase::Commit => assert_eq!(settle(&mut source, Owner::Here), Phase::Returned, "{words}"),
                Phase::Moved | Phase::Owing => assert!(told_release, "{words}"),
                other => panic!("{words}: {other:?}"),
            }
            if told_release {
                assert!(!runs(&mut source), "{words}");
                return None;
            }
            check_life(&mut source, &words);
            Some(Owner::Here)
        }
    }
}

/// Whether nothing that comes after it has to pass where the link stops: how far the ends have got is chance.
fn holds_up_nothing(word: &str, when: When) -> bool {
    matches!(word, "ask" | "answer") || (matches!(word, "synced" | "disk's end") && when == When::After)
}

fn sweep(ways: &[Way], fault: Fault) -> Vec<(Way, &'static str, When, Option<Owner>)> {
    let mut found = Vec::new();
    for way in ways.iter().copied() {
        for word in way.words() {
            for when in [When::Before, When::After] {
                found.push((way, *word, when, tear(way, word, when, fault)));
            }
        }
    }
    println!("{found:?}");
    found
}

/// Where all of memory is there when the target's machine begins to run.
const WHOLE: [Way; 2] = [Way::Copied, Way::Handed];

#[test]
fn every_phase_is_torn() {
    for phase in Phase::ALL {
        let said = said_in(phase);
        assert!(!said.is_empty() || matches!(phase, Phase::Returned | Phase::Dropped), "{phase:?}");
        for word in said {
            assert!(LISTS.iter().any(|list| list.contains(word)), "{phase:?}: {word:?} is in no list");
        }
    }
}

#[test]
fn a_link_that_is_cut_at_any_word_leaves_one_machine() {
    cut(&WHOLE);
}

#[test]
fn a_source_that_is_killed_at_any_word_leaves_a_target_that_has_all_or_nothing() {
    without_source(&WHOLE);
}

#[test]
fn a_target_that_is_killed_at_any_word_leaves_the_source_what_it_had_not_begun() {
    without_target(&WHOLE);
}

#[test]
fn where_memory_is_owed_there_is_one_machine_whatever_breaks() {
    cut(&[Way::Owed]);
    without_source(&[Way::Owed]);
    without_target(&[Way::Owed]);
}

fn cut(ways: &[Way]) {
    let found = sweep(ways, Fault::Cut);
    // Once the source has committed, and never before, it is the target's.
    for (_, word, when, owner) in found {
        // The way back is open until the cut. The target may be built by then, and the source may have heard it.
        let is_chance = (word, when) == ("state", When::After);
        let committed =
            matches!(word, "commit" | "released" | "whole") || (word, when) == ("ready", When::After);
        let expected = if committed { Owner::There } else { Owner::Here };
        // Between hearing of `ready` and the cut, the source may have been quicker or slower.
        if (word, when) != ("ready", When::After) && !is_chance && !holds_up_nothing(word, when) {
            assert_eq!(owner, Some(expected), "{word} {when:?}");
        }
    }
}

#[test]
fn nonsense_in_place_of_the_last_word_leaves_a_source_that_can_be_settled() {
    assert_eq!(tear(Way::Copied, "released", When::Instead, Fault::Cut), Some(Owner::There));
}

fn without_source(ways: &[Way]) {
    for (way, word, when, owner) in sweep(ways, Fault::KillSource) {
        // Where memory is owed, it may have come by then, or not.
        let has_all = way != Way::Owed && matches!(word, "ready" | "commit" | "released");
        let may_have = has_all || matches!(word, "ready" | "commit" | "released" | "whole");
        // Nothing that a source of memory that is there has to say waits for an answer.
        let is_chance = (way, word, when) == (Way::Handed, "prepared", When::After);
        if has_all {
            assert_eq!(owner, Some(Owner::There), "{word} {when:?}");
        } else if may_have {
            assert_ne!(owner, Some(Owner::Here), "{word} {when:?}");
        } else if word != "state" && !is_chance && !holds_up_nothing(word, when) {
            assert_eq!(owner, None, "{word} {when:?}");
        }
    }
}

fn without_target(ways: &[Way]) {
    for (_, word, when, owner) in sweep(ways, Fault::KillTarget) {
        match (word, when) {
            ("released" | "whole", _) => assert_eq!(owner, None, "{word} {when:?}"),
            // The source may have heard of it, and been heard, before the end came.
            ("ready" | "commit", When::After) => {}
            _ if holds_up_nothing(word, when) => {}
            _ => assert_eq!(owner, Some(Owner::Here), "{word} {when:?}"),
        }
    }
}
