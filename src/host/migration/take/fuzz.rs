//! What fuzzers call for the files of a server that comes from another host. What is taken lies where the pieces say, and files are as
//! long as they were to be; what is refused leaves nothing. No part of the daemon.
use tokio::io::{join, sink};
use wire::peer::{self, Kind};

use super::*;

/// Of the files that come.
const LENGTHS: [usize; 3] = [(8 << 10) + 512, 4096, 0];

/// Takes `data` as what another host sends of a server's files, below `place`, an empty directory that is empty again afterwards.
pub fn carried(data: &[u8], place: &Path) {
    let directory = place.join("carried");
    files::remove_tree(&directory).expect("no earlier one");
    std::fs::create_dir(&directory).expect("a directory");
    let name = |index: usize| directory.join(index.to_string());
    let begin = |(index, length)| Filling::begin(&name(index), length as u64).expect("room for it");
    let filling = LENGTHS.into_iter().enumerate().map(begin).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let outcome = runtime.block_on(fill(data, filling));
    // Waits for what is still written.
    drop(runtime);
    match (outcome, expected(data)) {
        (Ok(filling), Some(wanted)) => {
            filling.into_iter().for_each(|filled| filled.unfinished.finish().expect("it takes its place"));
            for (index, wanted) in wanted.iter().enumerate() {
                let found = std::fs::read(name(index)).expect("it took its place");
                assert!(found == *wanted, "file {index} of {} bytes is not what was sent", found.len());
            }
        }
        (Err(refused), None) => {
            assert!(matches!(refused.code, Code::InvalidRequest | Code::HostUnreachable), "{refused:?}");
            assert_eq!(std::fs::read_dir(&directory).expect("it is there").count(), 0, "something was left");
        }
        (Ok(_), None) => panic!("what should be refused was taken"),
        (Err(refused), Some(_)) => panic!("what should be taken was refused: {refused:?}"),
    }
    files::remove_tree(&directory).expect("its files are removed");
}

async fn fill(data: &[u8], filling: Vec<Filling>) -> Result<Vec<Filling>> {
    let mut link = Link::new(join(data, sink()));
    let mut pieces = Pieces::into(filling);
    loop {
        let received = link.receive().await;
        if pieces.take(received).await? == Sent::Everything {
            return Ok(pieces.filling);
        }
    }
}

/// The files as a second reading has them; nothing when one of the frames is wrong.
fn expected(mut stream: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut files = LENGTHS.map(|length| (vec![0; length], 0)).to_vec();
    loop {
        let (head, rest) = stream.split_first_chunk()?;
        let (kind, length) = peer::head(*head).ok()?;
        let (body, rest) = rest.split_at_checked(length)?;
        stream = rest;
        if kind == Kind::Document {
            let message = Message::read(body).ok()?;
            return (message == Message::Copied).then(|| files.into_iter().map(|(file, _)| file).collect());
        }
        let piece = Piece::read(body).ok().filter(|piece| !piece.bytes.is_empty())?;
        let (file, came) = files.get_mut(usize::from(piece.file))?;
        *came += piece.bytes.len();
        let start = usize::try_from(piece.offset).ok()?;
        let place = file.get_mut(start..start.checked_add(piece.bytes.len())?)?;
        place.copy_from_slice(piece.bytes);
        if *came > file.len() {
            return None;
        }
    }
}
