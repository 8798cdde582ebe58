//! Links against a VMM that misbehaves: late, silent, gone, talkative.
use std::path::PathBuf;

use sys::seqpacket::Listener;
use wire::control::FaultCode;

use super::*;

const SHORT: Duration = Duration::from_millis(50);
const SOON: Duration = Duration::from_secs(10);

/// A VMM that answers each request as `answer` says, on its own thread, until the link closes.
fn vmm(
    answer: impl Fn(&Channel, Request) -> bool + Send + 'static,
) -> (PathBuf, tempfile::TempDir, std::thread::JoinHandle<()>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let listener = Listener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let channel = Channel::new(listener.accept().unwrap());
        while let Ok(Some((request, _))) = channel.receive::<Request>() {
            if !answer(&channel, request) {
                return;
            }
        }
    });
    (path, directory, thread)
}

fn reply(channel: &Channel, id: u64, result: std::result::Result<Reply, Fault>) -> bool {
    channel.send(&Message::Reply { id, result }, &[]).is_ok()
}

fn greet(channel: &Channel, request: &Request) -> bool {
    let state = MachineState::Running;
    let hello = Reply::Hello {
        protocol: PROTOCOL,
        version: "test".to_owned(),
        state,
        console_written: 3,
        sandbox: Default::default(),
    };
    reply(channel, request.id, Ok(hello))
}

async fn connect(path: &Path) -> (Link, Hello, watch::Receiver<u64>, mpsc::Receiver<Notice>) {
    let console = watch::Sender::new(0);
    let seen = console.subscribe();
    let (notices, inbox) = mpsc::channel(2);
    let (link, hello) = Link::connect(path, console, notices, SOON).await.unwrap();
    (link, hello, seen, inbox)
}

#[tokio::test]
async fn what_a_vmm_says_unasked_goes_to_who_has_it_and_its_end_to_both() {
    let (path, _directory, thread) = vmm(|channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        Command::Pause => {
            channel.send(&Message::Notice(Notice::Console { written: 7 }), &[]).unwrap();
            channel.send(&Message::Notice(Notice::GuestPanicked), &[]).unwrap();
            reply(channel, request.id, Ok(Reply::Done))
        }
        _ => false,
    });
    let (link, _, seen, mut inbox) = connect(&path).await;
    let console = watch::Sender::new(0);
    let (notices, mut next_inbox) = mpsc::channel(2);
    link.pass_to(console.clone(), notices);
    // Whoever had it is told that there is nothing more to hear.
    assert_eq!(inbox.recv().await, None);
    link.order(Command::Pause, SOON).await.unwrap();
    assert_eq!((*console.borrow(), *seen.borrow()), (7, 0));
    assert_eq!(next_inbox.recv().await, Some(Notice::GuestPanicked));
    assert!(matches!(link.order(Command::Quit, SOON).await, Err(AskError::Gone)));
    // While somebody keeps the link of a VMM that has gone, too.
    assert_eq!(next_inbox.recv().await, None);
    let (late, mut late_inbox) = mpsc::channel(2);
    link.pass_to(console, late);
    assert_eq!(late_inbox.recv().await, None);
    drop(link);
    thread.join().unwrap();
}

#[tokio::test]
async fn replies_reach_their_askers_in_any_order() {
    let held = Mutex::new(Vec::new());
    let (path, _directory, thread) = vmm(move |channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        Command::SetBalloon { target_bytes } => {
            let mut held = held.lock().unwrap();
            held.push((request.id, target_bytes));
            // The last to ask is answered first.
            held.len() < 4
                || held.drain(..).rev().all(|(id, bytes)| reply(channel, id, Ok(Reply::Taken { bytes })))
        }
        _ => false,
    });
    let (link, hello, _seen, _inbox) = connect(&path).await;
    assert_eq!(
        hello,
        Hello { state: MachineState::Running, console_written: 3, sandbox: Sandbox::default() }
    );
    let ask = |target_bytes| link.ask(Command::SetBalloon { target_bytes }, &[], SOON);
    let (a, b, c, d) = tokio::join!(ask(1), ask(2), ask(3), ask(4));
    let bytes = [a, b, c, d].map(|reply| match reply.unwrap() {
        Reply::Taken { bytes } => bytes,
        other => panic!("{other:?}"),
    });
    assert_eq!(bytes, [1, 2, 3, 4]);
    // The VMM hears that the last clone has gone.
    drop(link);
    tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_command_is_answered_behind_others_and_forgotten_when_nobody_waits() {
    let held = Mutex::new(None);
    let (path, _directory, _thread) = vmm(move |channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        Command::Pause => held.lock().unwrap().replace(request.id).is_none(),
        Command::Resume => {
            let paused = held.lock().unwrap().take().unwrap();
            reply(channel, paused, Ok(Reply::Done)) && reply(channel, request.id, Ok(Reply::Done))
        }
        _ => true,
    });
    let (link, ..) = connect(&path).await;
    let paused = link.send(Command::Pause, &[], SOON).await.unwrap();
    link.order(Command::Resume, SOON).await.unwrap();
    paused.done().await.unwrap();
    for _ in 0..=limits::COMMANDS_MAX {
        drop(link.send(Command::Stats, &[], SOON).await.unwrap());
    }
    let late = link.send(Command::Stats, &[], SHORT).await.unwrap();
    assert!(late.left() <= SHORT);
    assert!(matches!(late.done().await, Err(AskError::Timeout(SHORT))));
}

#[tokio::test]
async fn a_silent_vmm_costs_a_bounded_wait_and_a_late_reply_confuses_nobody() {
    let first = Mutex::new(None);
    let (path, _directory, _thread) = vmm(move |channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        Command::Pause => {
            *first.lock().unwrap() = Some(request.id);
            true
        }
        _ => {
            let late = first.lock().unwrap().take().unwrap();
            reply(channel, late, Ok(Reply::Taken { bytes: 99 }))
                && reply(channel, request.id, Ok(Reply::Done))
        }
    });
    let (link, ..) = connect(&path).await;
    assert!(matches!(link.order(Command::Pause, SHORT).await, Err(AskError::Timeout(_))));
    link.order(Command::Resume, SOON).await.unwrap();
}

#[tokio::test]
async fn whoever_waits_when_the_vmm_goes_is_told() {
    let (path, _directory, thread) = vmm(|channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        _ => false,
    });
    let (link, ..) = connect(&path).await;
    assert!(!link.is_closed());
    assert!(matches!(link.order(Command::Pause, SOON).await, Err(AskError::Gone)));
    tokio::time::timeout(SOON, link.closed()).await.unwrap();
    assert!(matches!(link.order(Command::Pause, SOON).await, Err(AskError::Gone)));
    thread.join().unwrap();
}

#[tokio::test]
async fn refusals_carry_the_words_of_the_vmm() {
    let (path, _directory, _thread) = vmm(|channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        _ => {
            let fault = Fault { code: FaultCode::Host, detail: "KVM_RUN: EFAULT".to_owned() };
            reply(channel, request.id, Err(fault))
        }
    });
    let (link, ..) = connect(&path).await;
    let refused = link.order(Command::Pause, SOON).await.unwrap_err();
    assert!(refused.to_string().contains("KVM_RUN: EFAULT"));
    assert_eq!(Error::from(refused).code, Code::MachineFailed);
}

#[tokio::test]
async fn notices_are_bounded_and_console_output_only_wakes() {
    let (path, _directory, _thread) = vmm(|channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        _ => {
            for resets in 0..100 {
                channel.send(&Message::Notice(Notice::Booted { resets }), &[]).unwrap();
            }
            channel.send(&Message::Notice(Notice::Console { written: 7 }), &[]).unwrap();
            reply(channel, request.id, Ok(Reply::Done))
        }
    });
    let (link, _, mut seen, mut inbox) = connect(&path).await;
    link.order(Command::Pause, SOON).await.unwrap();
    assert_eq!(*seen.borrow_and_update(), 7);
    assert_eq!(inbox.recv().await, Some(Notice::Booted { resets: 0 }));
    assert_eq!(inbox.recv().await, Some(Notice::Booted { resets: 1 }));
    assert!(inbox.try_recv().is_err());
}

#[tokio::test]
async fn what_is_no_message_closes_the_link() {
    let (path, _directory, _thread) = vmm(|channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        _ => channel.send(&"nonsense", &[]).is_ok(),
    });
    let (link, ..) = connect(&path).await;
    assert!(matches!(link.order(Command::Pause, SOON).await, Err(AskError::Gone)));
}

#[tokio::test]
async fn a_vmm_that_always_has_more_to_say_leaves_other_tasks_their_turn() {
    let (go, told_to) = std::sync::mpsc::channel();
    let (done, all_sent) = std::sync::mpsc::channel();
    let (path, _directory, _thread) = vmm(move |channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        _ => {
            assert!(reply(channel, request.id, Ok(Reply::Done)));
            told_to.recv().unwrap();
            for written in 0..64 {
                channel.send(&Message::Notice(Notice::Console { written }), &[]).unwrap();
            }
            done.send(()).is_ok()
        }
    });
    let (link, _, seen, _inbox) = connect(&path).await;
    link.order(Command::Pause, SOON).await.unwrap();
    // The only thread of the runtime waits here, so that all of it is there when the reader gets its turn.
    go.send(()).unwrap();
    all_sent.recv().unwrap();
    let mut turns = std::collections::BTreeSet::new();
    while turns.last() != Some(&63) {
        tokio::task::yield_now().await;
        turns.insert(*seen.borrow());
    }
    assert!(turns.len() >= 4, "others had their turn only at {turns:?}");
}

#[tokio::test]
async fn a_vmm_that_floods_loses_its_connection() {
    const FLOOD: u64 = 100_000;
    let (told, sent) = std::sync::mpsc::channel();
    let (path, _directory, _thread) = vmm(move |channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        _ => {
            // Short, so that a busy machine too reads them faster than is allowed.
            let notice =
                Message::Notice(Notice::DeviceFault { device: "disk0".to_owned(), detail: "x".to_owned() });
            let sent = (0..FLOOD).take_while(|_| channel.send(&notice, &[]).is_ok()).count();
            told.send(sent as u64).unwrap();
            false
        }
    });
    let (link, ..) = connect(&path).await;
    assert!(matches!(link.order(Command::Pause, SOON).await, Err(AskError::Gone)));
    link.closed().await;
    assert!(matches!(link.order(Command::Pause, SOON).await, Err(AskError::Gone)));
    drop(link);
    assert!(sent.recv().unwrap() < FLOOD, "everything was read");
}

#[tokio::test]
async fn what_was_asked_for_does_not_count_as_a_flood() {
    let (path, _directory, _thread) = vmm(|channel, request| match request.command {
        Command::Hello { .. } => greet(channel, &request),
        _ => {
            reply(channel, request.id, Ok(Reply::Done))
                && channel.send(&Message::Notice(Notice::Console { written: request.id }), &[]).is_ok()
        }
    });
    let (link, ..) = connect(&path).await;
    for _ in 0..limits::UNASKED_MAX {
        link.order(Command::WatchConsole { seen: 0 }, SOON).await.unwrap();
    }
    assert!(!link.is_closed());
}

#[test]
fn a_vmm_may_say_so_much_in_each_span() {
    let start = Instant::now();
    let mut unasked = Unasked::new(start);
    for span in 0..2 {
        let now = start + limits::UNASKED_EVERY * span;
        assert!((0..limits::UNASKED_MAX).all(|_| unasked.take(now)));
        assert!(!unasked.take(now));
        // Each answer pays for itself and for one notice.
        unasked.answered();
        assert!(unasked.take(now) && unasked.take(now) && !unasked.take(now));
    }
}
