"""What must be preserved: the protocol of tasks, the tasks there are, and the losses and metrics they name."""

from lilliput.task.arrays import Arrays as Arrays
from lilliput.task.episodes import Episodes as Episodes
from lilliput.task.generation import Generation as Generation
from lilliput.task.losses import reads as reads
from lilliput.task.meaning import Meaning as Meaning
from lilliput.task.metrics import lower_is_better as lower_is_better
from lilliput.task.nested import Inputs as Inputs
from lilliput.task.nested import Model as Model
from lilliput.task.nested import call as call
from lilliput.task.nested import joined as joined
from lilliput.task.nested import leaves as leaves
from lilliput.task.nested import length as length
from lilliput.task.nested import mapped as mapped
from lilliput.task.nested import on as on
from lilliput.task.nested import outline as outline
from lilliput.task.nested import predict as predict
from lilliput.task.nested import take as take
from lilliput.task.protocol import Batch as Batch
from lilliput.task.protocol import Score as Score
from lilliput.task.protocol import Task as Task
from lilliput.task.random import uniform as uniform
from lilliput.task.read import source as source
